from seqlong.kernels.vector_decay.gates import activated
from seqlong.kernels.vector_decay.op import vector_decay
from seqlong.kernels.vector_decay.step import vector_decay_step

__all__ = ["activated", "vector_decay", "vector_decay_step"]
