"""Pure functions on tensors: the operations that the mixers are made of. They know nothing of models."""

from seqlong.kernels.inputs import starts_of

__all__ = ["starts_of"]
