"""Bytes in, SequenceBatch out. Nothing here knows of models."""
