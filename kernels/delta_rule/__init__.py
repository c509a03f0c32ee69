from seqlong.kernels.delta_rule.op import delta_rule
from seqlong.kernels.delta_rule.step import delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]
