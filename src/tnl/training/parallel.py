"""How a model is laid out over processes and devices, applied from outside: the model knows none of it.

Started by `torchrun`, every process holds a shard of the parameters (FSDP2, `fully_shard`). Processes form a grid of
data times context: those of one row of the grid share the tokens of each of their rows of text (context parallel), and
rows of the grid read different text. Started alone, the same code runs in one process. The backend is NCCL on GPUs and
gloo on a CPU.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tnl.models.tnl.layers_tnl import TnlAttention
from tnl.ops.linear_cross_entropy import linear_cross_entropy
from tnl.training.config import ParallelSettings, require
from tnl.training.model import choose_device

PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Device of this process.
        mesh: One-dimensional mesh of all processes, None for a process alone.
        grid: The same processes as a mesh of `data` times `context`; None where they share no rows.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    grid: DeviceMesh | None = None

    @property
    def context(self) -> tuple[int, int]:
        """Which part of its rows this process has, and how many parts there are."""
        return (0, 1) if self.grid is None else (self.grid["context"].get_local_rank(), self.grid["context"].size())

    @property
    def data(self) -> tuple[int, int]:
        """Which share of the rows of a batch this process has, and how many shares there are."""
        parts = self.context[1]
        return self.rank // parts, self.size // parts

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one should."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the processes (in place where there are several)."""
        if self.mesh is not None:
            torch.distributed.all_reduce(values, group=self.mesh.get_group())
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            torch.distributed.barrier(group=self.mesh.get_group())

    @contextlib.contextmanager
    def first_one_first(self) -> Iterator[None]:
        """The first process runs the block, then the others do: they find what it wrote."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def gather(self, value: object) -> list[object]:
        """The value of each process, on all of them."""
        if self.mesh is None:
            return [value]
        values: list[object] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.mesh.get_group())
        return values


@contextlib.contextmanager
def join_ranks(device: str, context: int = 1) -> Iterator[Ranks]:
    """Join the other processes where `torchrun` started this one; leave them at the end.

    Args:
        device: `auto`, `cpu` or `cuda`.
        context: Processes that share a row.

    Raises:
        ValueError: `cuda` without a GPU, or a number of processes that `context` does not divide.
    """
    chosen = choose_device(device)
    if "WORLD_SIZE" not in os.environ:
        require("parallel.context", context, context == 1, "1 for a process alone (torchrun starts several)")
        yield Ranks(rank=0, size=1, device=chosen, mesh=None)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    size = int(os.environ["WORLD_SIZE"])
    require("parallel.context", context, size % context == 0, f"a divisor of the number of processes, {size}")
    # Processes that torchrun starts again find the same store: what the dead ones wrote there must not be read, or
    # the new ones wait for them for ever (seen with torch 2.13 and gloo).
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Objects and counts go through gloo, tensors on a GPU through NCCL.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        mesh = init_device_mesh(chosen.type, (size,), mesh_dim_names=("all",))
        grid = None
        if context > 1:
            grid = init_device_mesh(chosen.type, (size // context, context), mesh_dim_names=("data", "context"))
        yield Ranks(rank=rank, size=size, device=chosen, mesh=mesh, grid=grid)
    finally:
        torch.distributed.destroy_process_group()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, as its class names them for sharding (`_no_split_modules`)."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def exact_modules_of(model: PreTrainedModel) -> list[nn.Module]:
    """Modules with a parameter that 16 bits would spoil, as the model's class names them for loading."""
    endings = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    owners = (name.rpartition(".")[0] for name, _ in model.named_parameters() if endings and name.endswith(endings))
    return [model.get_submodule(owner) for owner in owners]


def share_rows(model: PreTrainedModel, group: torch.distributed.ProcessGroup) -> None:
    """Let the processes of a group have a part of the tokens of each row each, in place.

    Raises:
        ValueError: The model has layers that cannot share a row.
    """
    from tnl.ops.context_parallel import lightning_attention_context_parallel

    attentions = [module for module in model.modules() if isinstance(module, TnlAttention)]
    if len(attentions) != model.config.num_hidden_layers:
        raise ValueError(
            "parallel.context: expected 1 for a model that is not TNL with linear attention in all layers, got "
            f"{len(attentions)} such layers of {model.config.num_hidden_layers} in {type(model).__name__}"
        )
    for attention in attentions:
        attention.operator = functools.partial(lightning_attention_context_parallel, group=group)


def lay_out(model: PreTrainedModel, settings: ParallelSettings, ranks: Ranks) -> None:
    """Apply context parallel, activation checkpointing, compilation and sharding to the model, in place."""
    if ranks.grid is not None:
        share_rows(model, ranks.grid["context"].get_group())
    use_lean_loss(model)
    blocks = blocks_of(model)
    if settings.precision == "bfloat16" and ranks.mesh is None:
        # Activations have the dtype of the embedding, which FSDP2 casts and autocast does not.
        model.get_input_embeddings().register_forward_hook(_to_bfloat16)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        final_norm = getattr(model.base_model, "norm", None)
        for module in (*blocks, *([final_norm] if isinstance(final_norm, nn.Module) else [])):
            module.compile()
    if ranks.mesh is not None:
        dtype = getattr(torch, settings.precision)
        # Activations have the dtype of the embedding; what else goes into a block in float32, as decays do, stays.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in exact_modules_of(model):
            fully_shard(module, mesh=ranks.mesh, mp_policy=replace(policy, param_dtype=None))
        for module in (*blocks, model):
            fully_shard(module, mesh=ranks.mesh, mp_policy=policy)


def _to_bfloat16(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.bfloat16)


def use_lean_loss(model: PreTrainedModel) -> None:
    """Let a model of transformers compute its loss in training as TNL does: without all logits, in place.

    For models whose logits are their head times the last hidden state, nothing else (`PLAIN_HEADS`).
    """
    if model.config.model_type not in PLAIN_HEADS:
        return
    plain_forward = model.forward

    @functools.wraps(plain_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        head, targets = model.get_output_embeddings(), kwargs.get("shift_labels")
        plain_head = type(head) is nn.Linear and not isinstance(head.weight, DTensor)
        if not model.training or targets is None or kwargs.get("num_items_in_batch") is None or not plain_head:
            return plain_forward(*args, **kwargs)
        count = kwargs.pop("num_items_in_batch")
        others = {name: value for name, value in kwargs.items() if name not in ("labels", "shift_labels")}
        hidden_states = model.base_model(*args, **others).last_hidden_state
        loss = linear_cross_entropy(hidden_states.flatten(0, 1), head.weight, targets.flatten())
        return CausalLMOutputWithPast(loss=loss / count)

    model.forward = forward


def autocast(settings: ParallelSettings, ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """Arithmetic in bfloat16 for a process alone; several have FSDP2's mixed precision."""
    wanted = settings.precision == "bfloat16" and ranks.mesh is None
    return torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=wanted)


def shard_again(model: nn.Module) -> None:
    """Give up the whole weights that a forward pass without a backward pass leaves."""
    if isinstance(model, FSDPModule):
        model.reshard()


def exchange_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over the processes, or only adds to this one's."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
