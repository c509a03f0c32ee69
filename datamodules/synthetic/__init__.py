"""Tasks made of nothing: they need no download, and say what a mixer can remember."""

from seqlong.datamodules.synthetic.data import SyntheticData
from seqlong.datamodules.synthetic.recall import MQAR, Row

__all__ = ["MQAR", "Row", "SyntheticData"]
