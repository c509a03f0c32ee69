"""Sequence parallelism: what mixers do where several processes hold parts of the same rows."""
