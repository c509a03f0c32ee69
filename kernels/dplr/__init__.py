from seqlong.kernels.dplr.op import dplr, dplr_step

__all__ = ["dplr", "dplr_step"]
