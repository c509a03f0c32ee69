"""Text: files of many kinds to bytes or tokens, documents to rows."""

from seqlong.datamodules.text.datamodule import Source, TextData
from seqlong.datamodules.text.metrics import TextMetrics
from seqlong.datamodules.text.splits import AutoSplit, DocumentSplit, FileSplit, PositionSplit

__all__ = ["AutoSplit", "DocumentSplit", "FileSplit", "PositionSplit", "Source", "TextData", "TextMetrics"]
