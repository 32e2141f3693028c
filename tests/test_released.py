"""Released TransNormerLLM folders: logits, conversion, complaints. Tier T0."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tnl.models import TnlForCausalLM, TransnormerConfig


@pytest.fixture
def released(shared_data: Path) -> Path:
    return shared_data / "released-format-checkpoint"


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    """A writable copy of the released folder."""
    folder = tmp_path / "released"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(released / name, folder / name)
    return folder


def logits(model: TnlForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def assert_same_model(model: TnlForCausalLM, other: TnlForCausalLM) -> None:
    """The same weights and dims; logits of both need not be bitwise the same, as weights lie elsewhere in memory."""
    sizes = ("num_attention_heads", "head_dim", "lrpe_layers", "scale_embeddings", "decay_schedule")
    assert [getattr(model.config, name) for name in sizes] == [getattr(other.config, name) for name in sizes]
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_float32_logits(released: Path) -> None:
    expected = load_file(released / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(released)
    assert isinstance(model, TnlForCausalLM)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["logits"], rtol=0, atol=2e-4)


def test_float64_logits(released: Path) -> None:
    """1e-9 of the largest logit, beside half a unit in the last place of the float32 in the file."""
    expected = load_file(released / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float64)
    wanted = expected["logits"].double()
    error = (logits(model, expected["input_ids"]) - wanted).abs()
    assert (error <= 1e-9 * wanted.abs().max() + wanted.abs() * 2**-24).all()


def test_generation_equals_logits(released: Path) -> None:
    """A second call gives what the first gave, and both what the logits say."""
    expected = load_file(released / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(released)
    prompt = expected["input_ids"][:, :40]
    tokens = [model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None) for _ in range(2)]
    assert torch.equal(*tokens)
    assert torch.equal(logits(model, tokens[0])[:, 39:-1].argmax(-1), tokens[0][:, 40:])


def test_saves_in_our_own_format(released: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(released)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "tnl"
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_tensors_decide_and_the_configuration_comes_second(copy: Path, released: Path) -> None:
    wrong = {"decoder_embed_dim": 1024, "hidden_dim": 8, "glu_dim": 1, "vocab_size": 9}
    change_config(copy, linear_use_lrpe_list=[0, 1, 1], decoder_attention_heads=2, decoder_layers=1, **wrong)
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert model.config.lrpe_layers == [0]
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(released))


def test_configuration_that_names_only_the_kind(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "transnormer"}')
    config = AutoModelForCausalLM.from_pretrained(copy).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert (config.intermediate_size, config.vocab_size, config.head_dim) == (96, 512, 16)


def test_heads_come_from_the_configuration_without_lrpe(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.token_mixer.lrpe.theta"]
    save_file(tensors, copy / "model.safetensors")
    config = AutoModelForCausalLM.from_pretrained(copy).config
    assert (config.num_attention_heads, config.lrpe_layers) == (4, [])
    change_config(copy, decoder_attention_heads=7)
    with pytest.raises(ValueError, match="decoder_attention_heads must divide the width 64"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_wrong_tensors_are_listed(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.channel_mixer.l3.weight"]
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.ones(64)
    tensors["model.layers.2.token_mixer.out_proj.weight"] = torch.ones(64, 63)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match="3 layers") as error:
        AutoModelForCausalLM.from_pretrained(copy)
    message = str(error.value)
    assert "missing: lm_head.weight, model.layers.1.channel_mixer.l3.weight;" in message
    assert "surplus: model.norm.weight;" in message
    assert "model.layers.2.token_mixer.out_proj.weight (expected [64, 64], got [64, 63])" in message
    assert message.count("expected") == 1


def test_an_absent_last_layer_is_missed(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.2." not in name}
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*model\.layers\.2\.channel_mixer\.l1\.weight"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_shards(copy: Path, released: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards = {"a.safetensors": dict(list(tensors.items())[:9]), "b.safetensors": dict(list(tensors.items())[9:])}
    for name, shard in shards.items():
        save_file(shard, copy / name)
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(AutoModelForCausalLM.from_pretrained(copy), AutoModelForCausalLM.from_pretrained(released))
    (copy / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks files .*: b\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert them to safetensors"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_cut_off_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(("field", "value"), [("norm_type", "layernorm"), ("linear_act_fun", "relu")])
def test_variants_that_were_never_released(copy: Path, field: str, value: str) -> None:
    change_config(copy, **{field: value})
    with pytest.raises(ValueError, match=f"{field} must be .* got '{value}'"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_configuration_is_registered(released: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(released), TransnormerConfig)
