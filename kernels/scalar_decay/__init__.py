from seqlong.kernels.scalar_decay.bidirectional import bidirectional_decay
from seqlong.kernels.scalar_decay.op import scalar_decay, ssd

__all__ = ["bidirectional_decay", "scalar_decay", "ssd"]
