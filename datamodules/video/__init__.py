"""Video: from files, or from nothing, to rows of patches."""

from seqlong.datamodules.video.caption_data import SyntheticCaptions
from seqlong.datamodules.video.captions import CaptionGenerator, MovingShapes
from seqlong.datamodules.video.codes import VideoCodes
from seqlong.datamodules.video.datamodule import VideoData
from seqlong.datamodules.video.sampling import Sampling
from seqlong.datamodules.video.synthetic import FlashCount, FlashOrder, MovingDigits, VideoGenerator, VideoNeedle
from seqlong.datamodules.video.synthetic_data import SyntheticVideo
from seqlong.datamodules.video.text_data import VideoText
from seqlong.datamodules.video.tubelets import Tubelets

__all__ = [
    "CaptionGenerator",
    "FlashCount",
    "FlashOrder",
    "MovingDigits",
    "MovingShapes",
    "Sampling",
    "SyntheticCaptions",
    "SyntheticVideo",
    "Tubelets",
    "VideoCodes",
    "VideoData",
    "VideoGenerator",
    "VideoNeedle",
    "VideoText",
]
