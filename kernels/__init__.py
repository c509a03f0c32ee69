"""Pure functions on tensors: the operations that the mixers are made of. They know nothing of models."""
