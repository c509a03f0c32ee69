from seqlong.kernels.rotary.op import rotary

__all__ = ["rotary"]
