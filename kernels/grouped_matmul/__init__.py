"""Matrix products of rows sorted into groups, each group with a matrix of its own: the work of experts."""

from seqlong.kernels.grouped_matmul.op import grouped_matmul
from seqlong.kernels.grouped_matmul.rows import collect_rows, place_rows

__all__ = ["collect_rows", "grouped_matmul", "place_rows"]
