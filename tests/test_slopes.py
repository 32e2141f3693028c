"""Decay of heads and layers of every model that has them. Tier T0."""

import math

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from tnl.slopes import DECAY_SCHEDULES, alibi_slopes, log_decay


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2.0**-i for i in range(1, 9)]),
        # 6 heads: the slopes of 4, then the first and third slope of 8
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (3, [2**-4, 2**-8, 2**-2]),
    ],
)
def test_alibi_slopes(heads: int, expected: list[float]) -> None:
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(expected, dtype=torch.float64))


def test_released_schedule() -> None:
    decay = log_decay("released", 3, 2)
    for layer, factor in enumerate([1 + 1e-5, 0.5 + 1e-5, 1e-5]):
        expected = -torch.tensor([2**-4, 2**-8]) * factor
        torch.testing.assert_close(decay[layer], expected, rtol=1e-6, atol=0)


def test_released_schedule_of_one_layer() -> None:
    torch.testing.assert_close(log_decay("released", 1, 1), torch.tensor([[-(2**-8) * (1 + 1e-5)]]))


def test_paper_schedule() -> None:
    decay = log_decay("paper", 4, 8).exp().double()
    for layer in range(4):
        for head in range(8):
            expected = math.exp(-(8 * head / 8) * (1 - layer / 4))
            assert decay[layer, head].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heads", [4, 6])
def test_minimax_schedule_is_that_of_transformers(heads: int) -> None:
    config = MiniMaxConfig(
        hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=5, block_size=8,
        layer_types=["linear_attention"] * 5,
    )  # fmt: skip
    decay = log_decay("minimax", 5, heads)
    for layer in range(5):
        theirs = MiniMaxLightningAttention(config, layer).get_slope_rate().flatten()
        torch.testing.assert_close(decay[layer], -theirs, rtol=2e-6, atol=0)


def test_minimax_schedules_differ_by_little() -> None:
    """Published code and transformers: apart from the last layer, whose factor is about 1e-5, to 1e-5."""
    published, transformers = log_decay("released", 80, 64), log_decay("minimax", 80, 64)
    torch.testing.assert_close(transformers[:-1], published[:-1], rtol=2e-5, atol=0)
    torch.testing.assert_close(transformers[-1], published[-1], rtol=2e-2, atol=0)


def test_ling_schedule_is_one_layer_late() -> None:
    """Ling counts from a layer that is not there: a first factor beyond 1, then those of the layer before."""
    decay = log_decay("ling", 5, 8)
    for layer, factor in enumerate([1.25, 1.0, 0.75, 0.5, 0.25]):
        expected = -alibi_slopes(8).float() * (factor + 1e-5)
        torch.testing.assert_close(decay[layer], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(decay[1:], log_decay("released", 5, 8)[:-1])
    torch.testing.assert_close(log_decay("ling", 1, 8), log_decay("released", 1, 8))


def test_uniform_schedule_has_no_layer_factor() -> None:
    decay = log_decay("uniform", 5, 4)
    assert (decay == -alibi_slopes(4).float()).all()


def test_no_decay() -> None:
    assert (log_decay("none", 2, 3) == 0).all()


@pytest.mark.parametrize("schedule", DECAY_SCHEDULES)
def test_contract(schedule: str) -> None:
    decay = log_decay(schedule, 24, 20)
    assert decay.shape == (24, 20)
    assert decay.dtype == torch.float32
    assert (decay <= 0).all()
    if schedule == "released":
        assert (decay < 0).all()


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of released, .* got 'alibi'"):
        log_decay("alibi", 2, 2)
