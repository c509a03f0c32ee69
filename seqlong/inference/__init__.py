"""Inference: a checkpoint to variant scores, embeddings, tracks, sequences and explanations, at any length."""

from seqlong.inference.model import Model, load

__all__ = ["Model", "load"]
