"""Tensor parallel for TNL: each process of a group has some heads of every attention and some channels of every GLU.

    q, k, v, u       rows of the projection by head          (no communication)
    lightning        the slopes of the own heads             (no communication)
    SRMSNorm         one sum of squares over all heads       (all-reduce of one number a token)
    output, down     columns by head, by channel             (all-reduce of the residual stream, one each)
    embedding, head  rows by token of the vocabulary

The matrices become DTensors of PyTorch (`parallelize_module`), so that FSDP2, optimisers, gradient clipping and
`torch.distributed.checkpoint` know them. Apply it before `fully_shard`, on another dimension of the same mesh.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.layers_tnl import TnlAttention, TnlGatedLinearUnit, TnlNorm, TnlRelativePositions
from tnl.models.tnl.modeling_tnl import TnlForCausalLM


def shard_heads(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide a TNL model among the processes of a one-dimensional mesh, in place; all have the same weights before.

    Activations between the blocks, logits and loss are the same in all of them.

    Raises:
        ValueError: Another model, norms other than SRMSNorm, or heads or channels that do not divide.
    """
    ranks = mesh.size()
    _check(model, ranks)
    for module in list(model.modules()):
        if isinstance(module, TnlAttention):
            _shard_attention(module, model.config, mesh)
        elif isinstance(module, TnlGatedLinearUnit):
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(module, mesh, plan)
    assert isinstance(model, TnlForCausalLM)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def whole_weights(model: PreTrainedModel, state: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Gathered weights of a divided model in the order that an undivided one has them in.

    Args:
        model: The model that `shard_heads` divided.
        state: Whole tensors by name, as `get_model_state_dict` gathers them.
        ranks: Number of processes that it was divided among.
    """
    result = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, TnlAttention):
            key = f"{name}.qkvu_proj.weight"
            streams = _streams(module)
            result[key] = state[key].unflatten(0, (ranks, streams, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    return result


def _check(model: PreTrainedModel, ranks: int) -> None:
    if not isinstance(model, TnlForCausalLM) or model.config.layer_types not in (
        None, ["linear_attention"] * model.config.num_hidden_layers,
    ):  # fmt: skip
        raise ValueError(f"model: expected a TNL with linear attention in all layers, got {type(model).__name__}")
    config = model.config
    if config.norm_type != "srms":
        raise ValueError(f"norm_type: expected 'srms' for tensor parallel, got {config.norm_type!r}")
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            raise ValueError(f"{name}: expected a multiple of {ranks} processes, got {getattr(config, name)}")


def _streams(attention: TnlAttention) -> int:
    return 4 if attention.gate in ("linear", "sigmoid") else 3


def _shard_attention(attention: TnlAttention, config: TnlConfig, mesh: DeviceMesh) -> None:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    heads = attention.num_heads // ranks
    # Rows q|k|v|u of all heads become rows q|k|v|u of the first process's heads, then those of the second, ...
    weight = attention.qkvu_proj.weight
    rows = weight.detach().unflatten(0, (_streams(attention), ranks, -1)).transpose(0, 1).flatten(0, 2)
    attention.qkvu_proj.weight = nn.Parameter(rows.contiguous(), weight.requires_grad)
    plan: dict[str, Any] = {"qkvu_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    if attention.gate == "low_rank_sigmoid":
        plan |= {"gate_down_proj": ColwiseParallel(output_layouts=Replicate()), "gate_up_proj": ColwiseParallel()}
    parallelize_module(attention, mesh, plan)
    attention.num_heads = heads
    attention.register_forward_pre_hook(_OwnDecays(slice(rank * heads, (rank + 1) * heads)))
    attention.norm = _SharedNorm(config, attention.head_dim * heads * ranks, mesh)
    if attention.lrpe is not None:
        attention.lrpe.theta = nn.Parameter(distribute_tensor(attention.lrpe.theta.detach(), mesh, [Shard(0)]))
        attention.lrpe.__class__ = _OwnRelativePositions


class _OwnDecays:
    """Hands an attention the decays of its heads."""

    def __init__(self, own: slice) -> None:
        self.own = own

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, log_decay, *rest = arguments
        return hidden_states, None if log_decay is None else log_decay[self.own], *rest


class _OwnRelativePositions(TnlRelativePositions):
    """LRPE with the angles of the own heads."""

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of `theta t`, `[B or 1, T, own heads, E]`."""
        assert isinstance(self.theta, DTensor)
        return self.rotation_by(self.theta.to_local(), position_ids, dtype)


class _SharedNorm(TnlNorm):
    """SRMSNorm over all heads with a part of them here: one sum over the processes each way."""

    def __init__(self, config: TnlConfig, width: int, mesh: DeviceMesh) -> None:
        super().__init__(config, width)
        self.width, self.group = width, mesh.get_group()

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise `[..., own width]` and multiply by the gate; the result has the input's dtype."""
        wide = hidden_states.float()
        squares = _Sum.apply(wide.square().sum(-1, keepdim=True), self.group)
        normed = (wide * torch.rsqrt(squares / self.width + self.eps)).to(hidden_states.dtype)
        return normed if gate is None else gate * normed


class _Sum(torch.autograd.Function):
    """Sum over the processes, whose gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
