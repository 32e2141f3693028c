"""Configuration and presets. Tier T0."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tnl.models import PRESETS, TnlConfig, TnlForCausalLM


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("44m", 45.4e6),
        ("385m", 464_520_192),  # with 64000 untied embeddings, the released count
        ("1b", 1.15e9),
        ("3b", 3.07e9),
        ("7b", 7.10e9),
        ("15b", 14.83e9),
    ],
)
def test_preset_on_the_meta_device(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = TnlForCausalLM(TnlConfig.from_preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(parameters, int):
        assert count == parameters
    else:
        assert count == pytest.approx(parameters, rel=0.01)
    assert model.config.head_dim == 128


def test_tiny_preset_is_small() -> None:
    with torch.device("meta"):
        model = TnlForCausalLM(TnlConfig.from_preset("tiny"))
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6


def test_preset_overrides() -> None:
    config = TnlConfig.from_preset("tiny", vocab_size=300, dropout=0.1)
    assert (config.vocab_size, config.dropout) == (300, 0.1)
    assert PRESETS["tiny"]["vocab_size"] == 256


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of tiny, 44m, .* got '2b'"):
        TnlConfig.from_preset("2b")


def test_unknown_override() -> None:
    with pytest.raises(ValueError, match="TnlConfig has no field hiden_size"):
        TnlConfig.from_preset("tiny", hiden_size=64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("num_hidden_layers", 2.0),
        ("num_attention_heads", 0),
        ("intermediate_size", True),
        ("head_dim", 0),
        ("norm_eps", 0.0),
        ("initializer_range", -0.1),
        ("dropout", 1.0),
        ("scale_embeddings", 1),
        ("decay_schedule", "alibi"),
        ("gate", "swish"),
        ("hidden_act", "swish"),
        ("value_act", None),
        ("glu_act", ""),
        ("norm_type", "simplermsnorm"),
        ("layer_types", ["linear_attention"]),
        ("layer_types", ["linear_attention"] * 23 + ["sliding_attention"]),
        ("rope_theta", 0),
        ("lrpe_layers", "last"),
        ("lrpe_layers", [0, 24]),
        ("lrpe_layers", 0),
        ("pad_token_id", 64000),
        ("eos_token_id", [2, -1]),
    ],
)
def test_field_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .* got "):
        TnlConfig(**{field: value})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"head_dim must be .*\(7 and 64\)"):
        TnlConfig(hidden_size=64, num_attention_heads=7)


def test_head_dim_is_free() -> None:
    config = TnlConfig(hidden_size=64, num_attention_heads=7, head_dim=16)
    assert config.state_shape(0) == (7, 32, 16)
    assert config.state_shape(1) == (7, 16, 16)


def test_rotary_positions_need_an_even_head_dim() -> None:
    with pytest.raises(ValueError, match="head_dim must be even where there is full attention, got 5"):
        TnlConfig(num_hidden_layers=1, head_dim=5, layer_types=["full_attention"])


def test_softmax_layers_carry_no_lrpe() -> None:
    layer_types = ["full_attention", "linear_attention"]
    config = TnlConfig(num_hidden_layers=2, layer_types=layer_types, lrpe_layers="all")
    assert [config.uses_lrpe(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("lrpe_layers", "expected"),
    [("first", [True, False]), ("all", [True, True]), ("none", [False, False]), ([1, 1], [False, True])],
)
def test_lrpe_layers(lrpe_layers: str | list[int], expected: list[bool]) -> None:
    config = TnlConfig.from_preset("tiny", num_hidden_layers=2, lrpe_layers=lrpe_layers)
    assert [config.uses_lrpe(i) for i in range(2)] == expected


def test_save_and_load(tmp_path: Path) -> None:
    config = TnlConfig.from_preset("tiny", lrpe_layers=[2, 0], decay_schedule="paper", eos_token_id=[5, 6])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TnlConfig)
    differences = {key for key, value in loaded.to_dict().items() if value != config.to_dict()[key]}
    assert differences == {"_name_or_path"}
