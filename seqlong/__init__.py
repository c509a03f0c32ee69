"""seqlong: hybrid sequence models for inputs of 100 thousand to millions of positions."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("seqlong")
except PackageNotFoundError:  # a bare clone on the path
    __version__ = "0+unknown"
