from seqlong.kernels.short_conv.op import short_conv, tail

__all__ = ["short_conv", "tail"]
