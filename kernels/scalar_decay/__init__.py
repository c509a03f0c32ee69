from seqlong.kernels.scalar_decay.op import scalar_decay, ssd

__all__ = ["scalar_decay", "ssd"]
