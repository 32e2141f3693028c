"""A TNL divided by heads computes what the whole one does, alone and together with FSDP2. Tier T2."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.ranks import run_ranks
from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.tensor_parallel import shard_heads, whole_weights

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "lrpe_layers": "all", "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "gate": "low_rank_sigmoid"},
    {"gate": "none", "decay_schedule": "none"},
]


def build(**changes: Any) -> TnlForCausalLM:
    torch.manual_seed(0)
    return TnlForCausalLM(TnlConfig.from_preset("tiny", **(SIZES | changes))).train()


def rows(first: int, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 60, (4, 17), generator=generator)[first : first + count]
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "shift_labels": tokens[:, 1:]}


def step(model: TnlForCausalLM, batch: dict[str, torch.Tensor], scale: float) -> tuple[torch.Tensor, float]:
    """Loss and gradient norm of one step of AdamW, whose large epsilon leaves gradients in proportion."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, fused=True)
    loss = model(**batch, num_items_in_batch=torch.tensor(64), use_cache=False).loss
    (loss * scale).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.detach(), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def gathered(model: TnlForCausalLM, ranks: int) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return whole_weights(model, state, ranks)


def compare(changes: dict[str, Any], shares: int) -> None:
    """`shares` rows of processes have different text; the processes of each divide the heads."""
    whole, divided = build(**changes), build(**changes)
    ranks = dist.get_world_size() // shares
    mesh = init_device_mesh("cpu", (shares, ranks), mesh_dim_names=("data", "tensor"))
    before = whole.state_dict()
    shard_heads(divided, mesh["tensor"])
    if shares > 1:
        for module in (*divided.model.layers, divided):
            fully_shard(module, mesh=mesh["data"])
    else:
        for name, value in gathered(divided, ranks).items():
            assert torch.equal(value, before[name]), name
        batch = rows(0, 4)
        logits = divided.eval()(batch["input_ids"], use_cache=False).logits
        torch.testing.assert_close(logits, whole.eval()(batch["input_ids"], use_cache=False).logits)
        whole.train(), divided.train()

    loss, norm = step(whole, rows(0, 4), 1.0)
    mine = 4 // shares
    part, divided_norm = step(divided, rows(mesh["data"].get_local_rank() * mine, mine), shares)
    dist.all_reduce(part, group=mesh["data"].get_group())
    torch.testing.assert_close(part, loss, rtol=0, atol=1e-6)
    assert divided_norm == pytest.approx(norm, rel=1e-5)
    expected = whole.state_dict()
    for name, value in gathered(divided, ranks).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize("changes", VARIANTS, ids=["plain", "tied", "no gate"])
def test_divided_model_equals_the_whole(changes: dict[str, Any]) -> None:
    run_ranks(2, compare, changes, 1)


def test_divided_by_four() -> None:
    run_ranks(4, compare, {}, 1)


def test_together_with_fsdp() -> None:
    run_ranks(4, compare, {}, 2)


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for changes, message in (
        ({"norm_type": "rms"}, "norm_type: expected 'srms' for tensor parallel, got 'rms'"),
        ({"num_attention_heads": 1}, "num_attention_heads: expected a multiple of 2 processes, got 1"),
        ({"intermediate_size": 47}, "intermediate_size: expected a multiple of 2 processes, got 47"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "model: expected a TNL with linear attention"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_heads(build(**changes), mesh)


def test_models_that_cannot_be_divided() -> None:
    run_ranks(2, refused)
