"""Models are made in shards: the same weights however many processes, no whole model in any. Tier T2."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.ranks import run_ranks
from tests.test_matrix_network import make_network
from tnl.training.config import ModelSettings, ParallelSettings
from tnl.training.model import build_model, fill_model
from tnl.training.parallel import Ranks, lay_out
from tnl.training.tokenizer import byte_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS = {
    "tnl": ("tiny", SMALL),
    "untied": ("tiny", {**SMALL, "tie_word_embeddings": False}),
    "llama": ("llama", SMALL),  # with buffers that no checkpoint has
}

NETWORK = make_network((48, 32), (48,), (32,), ((0,), (1,)), [(0, 1, 5)], ((0, 0),)).to_dict()
COMPRESSED = {**SMALL, "tensor_networks": {"model.layers.0.mlp.gate_proj": NETWORK}}


def make(name: str, overrides: dict[str, Any], ranks: Ranks) -> PreTrainedModel:
    model, weights = build_model(ModelSettings(name, overrides), byte_tokenizer(), 64)
    lay_out(model, ParallelSettings(), ranks)
    torch.manual_seed(1)
    fill_model(model, weights, ranks.device)
    return model


def alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"), None)


def together() -> Ranks:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh)


def compare(name: str, overrides: dict[str, Any]) -> None:
    single, sharded = make(name, overrides, alone()), make(name, overrides, together())
    parameters = dict(single.named_parameters())
    assert sorted(parameters) == sorted(key for key, _ in sharded.named_parameters())
    for key, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), parameters[key]), key
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(sharded(tokens).logits, single(tokens).logits)
    after = torch.rand(())  # random numbers go on alike
    torch.manual_seed(1)
    make(name, overrides, alone())
    assert torch.equal(after, torch.rand(()))


@pytest.mark.parametrize("model", [*MODELS.values(), ("tiny", COMPRESSED)], ids=[*MODELS, "compressed"])
def test_new_weights_are_those_of_one_process(model: tuple[str, dict[str, Any]]) -> None:
    run_ranks(2, compare, *model)


def test_a_model_without_rules_for_its_weights() -> None:
    model, _ = build_model(ModelSettings("tiny", SMALL), byte_tokenizer(), 64)
    model.extra = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"model\.name: expected a model that makes new weights, got none for extra"):
        fill_model(model, None, torch.device("cpu"))


def test_new_weights_have_the_distribution_of_the_model() -> None:
    model = make("tiny", SMALL, alone())
    deviations = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
    assert deviations == pytest.approx(dict.fromkeys(deviations, model.config.initializer_range), rel=0.05)
    assert (model.model.embed_tokens.weight[model.config.pad_token_id] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_weights_of_a_folder(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = make(*MODELS[model], alone()).to(dtype)
    saved.generation_config.repetition_penalty = 1.5
    saved.save_pretrained(tmp_path)
    loaded = make(str(tmp_path), {}, alone())
    assert loaded.generation_config.repetition_penalty == 1.5
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(value, parameters[key]) for key, value in expected.named_parameters())
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)
    run_ranks(2, compare, str(tmp_path), {})


def test_weights_under_other_names(tmp_path: Path) -> None:
    """A folder of the model without its head, in one process and in two: transformers finds the names."""
    whole = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, tie_word_embeddings=True, **SMALL))
    whole.model.save_pretrained(tmp_path)
    loaded = make(str(tmp_path), {}, alone())
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
    run_ranks(2, compare, str(tmp_path), {})


def status(field: str) -> int:
    """Bytes of this process as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def bounded() -> None:
    overrides = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    ranks = together()
    make("tiny", SMALL, ranks)  # what is imported and kept the first time
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    model = make("tiny", overrides, ranks)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    assert size > 100e6
    assert status("VmHWM") - before < 0.5 * size  # a quarter is this process's share


def test_no_process_has_the_whole_model() -> None:
    run_ranks(4, bounded)
