"""A step of decoding in one kernel against the modules of the model (T1, a process for each program; T3 on a GPU)."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_decoding_tnl import random_tokens, small_model
from tnl.models import TnlCache, TnlForCausalLM
from tnl.models.tnl.decoding_tnl import prefill, step_layers
from tnl.ops.backends import interpreted
from tnl.ops.decode_step import DecodeStep, StepLayer, why_not

pytest.importorskip("triton")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 44, "num_hidden_layers": 2}
LARGE: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 1410}


def make_step(model: TnlForCausalLM, states: list[Tensor], **options: Any) -> DecodeStep:
    scale = model.model.embedding_scale
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    layers = step_layers(model, states)
    return DecodeStep(embedding, layers, head, embedding_scale=scale, norm_eps=model.config.norm_eps, **options)


def run_in_processes(step: DecodeStep, token: Tensor, position: Tensor, logits: Tensor) -> None:
    """What a GPU does at once: programs wait for each other, which the interpreter would run one after another."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.interpreter_builder
    index = type(builder).set_grid_idx
    children = []
    for program in range(step.programs):
        child = os.fork()
        if child == 0:

            def take_part(x: int, y: int, z: int, program: int = program) -> None:
                if x > 0:
                    os._exit(0)  # this program has run
                index(builder, program, 0, 0)

            builder.set_grid_idx = take_part
            try:
                step(token, position, logits)
            finally:
                os._exit(int(step.programs > 1))
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


@pytest.mark.skipif(not interpreted(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("changes", [{"lrpe_layers": "all"}, {"decay_schedule": "none"}])
def test_step_has_the_logits_of_the_modules(changes: dict[str, Any]) -> None:
    model = small_model(**(SIZES | changes))
    tokens, cache = random_tokens(1, 9), TnlCache(model.config)
    with torch.inference_mode():
        _, position = prefill(model, tokens[:, :6], torch.ones(1, 6), cache)
        states = [layer.state.clone() for layer in cache.layers if layer.state is not None]
        step = make_step(model, states, programs=4)
        logits = torch.full((1, model.config.vocab_size), torch.nan)
        shared = (step.stream, step.attended, step.squares, step.qkvu, step.counters, logits, position, *states)
        for tensor in shared:
            tensor.share_memory_()
        step.table[:-1, 5] = torch.tensor([state.data_ptr() for state in states])
        for token in tokens[:, 6:].T:
            wanted = model(token[:, None], position_ids=position[None], past_key_values=cache).logits[:, 0]
            run_in_processes(step, token, position, logits)
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    for state, layer in zip(states, cache.layers, strict=True):
        torch.testing.assert_close(state, layer.state, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"lrpe_layers": "all", "hidden_size": 1024, "num_attention_heads": 8}])
def test_step_on_a_gpu(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """No further from float32 than the modules are, twice; sums in another order are nearer to each other than that."""
    exact, model = (small_model("cuda", **(LARGE | changes)).to(kind) for kind in (torch.float32, dtype))
    tokens, results = random_tokens(1, 40, "cuda"), []
    with torch.inference_mode():
        wanted = exact(tokens).logits[0, 3:].float()
        modules = model(tokens).logits[0, 3:].float()
        for _ in range(2):
            cache = TnlCache(model.config)
            _, position = prefill(model, tokens[:, :3], torch.ones(1, 3, device="cuda"), cache)
            step = make_step(model, [layer.state.clone() for layer in cache.layers if layer.state is not None])
            logits = torch.full((1, model.config.vocab_size), torch.nan, device="cuda", dtype=dtype)
            each = []
            for token in tokens[:, 3:].T:
                step(token.contiguous(), position, logits)
                each.append(logits[0].clone())
            results.append(torch.stack(each))
    allowed = 2 * (modules - wanted).norm()
    assert all((result.float() - wanted).norm() <= allowed for result in results)
    assert (results[0].float() - results[1].float()).norm() <= allowed / 2


def test_what_is_not_served_is_refused() -> None:
    model = small_model(**SIZES)
    states = [torch.zeros(1, 2, 32 if layer == 0 else 16, 16) for layer in range(2)]
    layers = step_layers(model, states)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    options: dict[str, Any] = {"embedding_scale": 1.0, "norm_eps": 1e-6}
    if not interpreted():
        with pytest.raises(ValueError, match="device: expected a GPU"):
            DecodeStep(embedding, layers, head, **options)
        return
    with pytest.raises(ValueError, match=r"embedding: expected \[50, 32\]"):
        DecodeStep(embedding[:, ::2], layers, head, **options)
    wrong = [StepLayer(**(vars(layers[0]) | {"state": states[1]})), layers[1]]
    with pytest.raises(ValueError, match=r"layers\[0\].state: expected contiguous"):
        DecodeStep(embedding, wrong, head, **options)
    cpu = torch.device("cpu")
    assert "width: expected a power of two" in (why_not(cpu, torch.float32, 24, 2, 16) or "")
    assert "dtype" in (why_not(cpu, torch.float64, 32, 2, 16) or "")
    assert "so few processors" in (why_not(cpu, torch.float32, 4096, 32, 128) or "")
