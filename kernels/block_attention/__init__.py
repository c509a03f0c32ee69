from seqlong.kernels.block_attention.op import block_attention, choose_blocks

__all__ = ["block_attention", "choose_blocks"]
