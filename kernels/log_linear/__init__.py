from seqlong.kernels.log_linear.levels import Fenwick
from seqlong.kernels.log_linear.op import log_linear, log_linear_step

__all__ = ["Fenwick", "log_linear", "log_linear_step"]
