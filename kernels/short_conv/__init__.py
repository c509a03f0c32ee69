from seqlong.kernels.short_conv.op import short_conv

__all__ = ["short_conv"]
