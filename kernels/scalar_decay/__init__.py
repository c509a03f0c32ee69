from seqlong.kernels.scalar_decay.op import scalar_decay

__all__ = ["scalar_decay"]
