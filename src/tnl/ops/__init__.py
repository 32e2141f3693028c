"""Operators: lightning attention and the norms. They need torch alone and know no model."""

from tnl.ops.lightning import lightning_attention, lightning_attention_step
from tnl.ops.norm import gated_srms_norm, srms_norm

__all__ = ["gated_srms_norm", "lightning_attention", "lightning_attention_step", "srms_norm"]
