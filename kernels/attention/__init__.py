from seqlong.kernels.attention.op import attention
from seqlong.kernels.attention.summaries import summary_attention

__all__ = ["attention", "summary_attention"]
