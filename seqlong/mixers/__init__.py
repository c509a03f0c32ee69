"""Mixers: what moves information along the sequence. Each is one file that passes ``tests/test_mixers.py``."""

from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer, MixerFactory, MixerState
from seqlong.mixers.bidirectional import Bidirectional
from seqlong.mixers.mamba2 import Mamba2

__all__ = ["Attention", "Bidirectional", "Mamba2", "Mixer", "MixerFactory", "MixerState"]
