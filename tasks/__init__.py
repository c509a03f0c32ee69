"""Tasks: what a model is trained for. Loss, metrics and optimiser; they know nothing of files."""

from seqlong.tasks.base import SequenceTask
from seqlong.tasks.base_labels import BaseLabelling
from seqlong.tasks.causal_lm import CausalLM
from seqlong.tasks.classification import SequenceClassification
from seqlong.tasks.masked_lm import MaskedLM
from seqlong.tasks.mixed_objectives import MixedObjectives
from seqlong.tasks.regression import SequenceRegression
from seqlong.tasks.tracks import TrackPrediction
from seqlong.tasks.video_classification import VideoClassification
from seqlong.tasks.video_patches import MaskedVideo, VideoPrediction
from seqlong.tasks.video_regression import VideoRegression
from seqlong.tasks.video_text import VideoTextMatching
from seqlong.tasks.video_tokenizer import VideoTokenizer

__all__ = [
    "BaseLabelling",
    "CausalLM",
    "MaskedLM",
    "MaskedVideo",
    "MixedObjectives",
    "SequenceClassification",
    "SequenceRegression",
    "SequenceTask",
    "TrackPrediction",
    "VideoClassification",
    "VideoPrediction",
    "VideoRegression",
    "VideoTextMatching",
    "VideoTokenizer",
]
