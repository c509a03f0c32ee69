from seqlong.kernels.dplr.op import dplr
from seqlong.kernels.dplr.step import dplr_step

__all__ = ["dplr", "dplr_step"]
