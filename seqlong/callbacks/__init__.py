"""What goes on around the training steps. Each is a Lightning callback, named in configs/trainer/default.yaml."""

from seqlong.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from seqlong.callbacks.divergence import Divergence
from seqlong.callbacks.effective_context import EffectiveContext
from seqlong.callbacks.expert_load import ExpertLoad
from seqlong.callbacks.finite_guard import FiniteGuard
from seqlong.callbacks.loggers import MetricsCsv, TensorBoard
from seqlong.callbacks.loss_by_position import LossByPosition
from seqlong.callbacks.predictions import PredictionWriter
from seqlong.callbacks.preemption import Preempted, Preemption
from seqlong.callbacks.progress import Progress
from seqlong.callbacks.recall import Recall
from seqlong.callbacks.repeats import Repeats
from seqlong.callbacks.run_folder import RunFolder
from seqlong.callbacks.step_seed import StepSeed
from seqlong.callbacks.throughput import Throughput
from seqlong.callbacks.watchdog import Watchdog

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoints",
    "Divergence",
    "EffectiveContext",
    "ExpertLoad",
    "FiniteGuard",
    "LossByPosition",
    "MetricsCsv",
    "PredictionWriter",
    "Preempted",
    "Preemption",
    "Progress",
    "Recall",
    "Repeats",
    "RunFolder",
    "StepSeed",
    "TensorBoard",
    "Throughput",
    "Watchdog",
]
