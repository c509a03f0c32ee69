"""Mixers: what moves information along the sequence. Each passes ``tests/test_mixers.py``."""

from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer, MixerFactory, MixerState
from seqlong.mixers.bidirectional import Bidirectional
from seqlong.mixers.convolution import Convolution
from seqlong.mixers.deltanet import KDA, DeltaNet, GatedDeltaNet
from seqlong.mixers.diagonal import S4D, Mamba1
from seqlong.mixers.differential import DifferentialAttention
from seqlong.mixers.feature_maps import Based, Hedgehog
from seqlong.mixers.gla import GLA, SimpleGLA
from seqlong.mixers.gmu import GatedMemoryUnit
from seqlong.mixers.hgrn2 import HGRN2
from seqlong.mixers.latent_attention import LatentAttention
from seqlong.mixers.linear_attention import CosFormer2, LightningAttention, LinearAttention, RetNet
from seqlong.mixers.log_linear import LogLinearGatedDeltaNet, LogLinearMamba2
from seqlong.mixers.mamba2 import Mamba2
from seqlong.mixers.mlstm import MLSTM
from seqlong.mixers.moh import MoH
from seqlong.mixers.mom import MoM
from seqlong.mixers.parallel import Parallel
from seqlong.mixers.prefix import PrefixAttention, PrefixMixer
from seqlong.mixers.rat import Rat
from seqlong.mixers.rglru import RGLRU
from seqlong.mixers.rwkv6 import RWKV6
from seqlong.mixers.rwkv7 import RWKV7
from seqlong.mixers.scout import Scout
from seqlong.mixers.shared_attention import SharedAttention
from seqlong.mixers.sparse_attention import MoBA, NativeSparseAttention
from seqlong.mixers.sse import SSE
from seqlong.mixers.switch_head import SwitchHead

__all__ = [
    "GLA",
    "HGRN2",
    "KDA",
    "MLSTM",
    "RGLRU",
    "RWKV6",
    "RWKV7",
    "S4D",
    "SSE",
    "Attention",
    "Based",
    "Bidirectional",
    "Convolution",
    "CosFormer2",
    "DeltaNet",
    "DifferentialAttention",
    "GatedDeltaNet",
    "GatedMemoryUnit",
    "Hedgehog",
    "LatentAttention",
    "LightningAttention",
    "LinearAttention",
    "LogLinearGatedDeltaNet",
    "LogLinearMamba2",
    "Mamba1",
    "Mamba2",
    "Mixer",
    "MixerFactory",
    "MixerState",
    "MoBA",
    "MoH",
    "MoM",
    "NativeSparseAttention",
    "Parallel",
    "PrefixAttention",
    "PrefixMixer",
    "Rat",
    "RetNet",
    "Scout",
    "SharedAttention",
    "SimpleGLA",
    "SwitchHead",
]
