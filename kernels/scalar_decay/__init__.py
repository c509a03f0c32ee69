from seqlong.kernels.scalar_decay.bidirectional import bidirectional_decay
from seqlong.kernels.scalar_decay.op import scalar_decay, ssd
from seqlong.kernels.scalar_decay.step import ssd_step
from seqlong.kernels.scalar_decay.token_step import scalar_decay_step

__all__ = ["bidirectional_decay", "scalar_decay", "scalar_decay_step", "ssd", "ssd_step"]
