"""Tasks made of nothing: they need no download, and say what a mixer can remember."""

from seqlong.datamodules.synthetic.copying import Copy, Induction, KeyedCopy, SelectiveCopy
from seqlong.datamodules.synthetic.counting import CommonWords, FrequentWords
from seqlong.datamodules.synthetic.data import RecallBatch, SyntheticData
from seqlong.datamodules.synthetic.from_files import Babilong, LongRangeArena
from seqlong.datamodules.synthetic.generator import RecallTask, Rows
from seqlong.datamodules.synthetic.grid import Cell
from seqlong.datamodules.synthetic.motifs import DnaNeedle
from seqlong.datamodules.synthetic.mqar import MQAR, GapMQAR, RewriteMQAR
from seqlong.datamodules.synthetic.needles import Needle, Phonebook
from seqlong.datamodules.synthetic.tracking import VariableTracking

__all__ = [
    "MQAR",
    "Babilong",
    "Cell",
    "CommonWords",
    "Copy",
    "DnaNeedle",
    "FrequentWords",
    "GapMQAR",
    "Induction",
    "KeyedCopy",
    "LongRangeArena",
    "Needle",
    "Phonebook",
    "RecallBatch",
    "RecallTask",
    "RewriteMQAR",
    "Rows",
    "SelectiveCopy",
    "SyntheticData",
    "VariableTracking",
]
