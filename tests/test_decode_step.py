"""A step of decoding in one kernel against the modules of the model (tier T3; what is refused T0)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_decoding_tnl import random_tokens, small_model
from tnl.models import TnlCache, TnlForCausalLM
from tnl.models.tnl.decoding_tnl import prefill, step_layers
from tnl.ops.decode_step import DecodeStep, why_not

SIZES: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 1410}
WIDE: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 5632}


def make_step(model: TnlForCausalLM, states: list[Tensor]) -> DecodeStep:
    scale, eps = model.model.embedding_scale, model.config.norm_eps
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    return DecodeStep(embedding, step_layers(model, states), head, embedding_scale=scale, norm_eps=eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [SIZES, WIDE, SIZES | {"lrpe_layers": "all", "num_hidden_layers": 2}, SIZES | {"decay_schedule": "none"}],
)
def test_step_on_a_gpu(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """As near to float32 as the modules are, twice; sums in another order are nearer to each other than that."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the kernel needs compute capability 9.0")
    exact, model = (small_model("cuda", initializer_range=0.03, **changes).to(kind) for kind in (torch.float32, dtype))
    tokens, results, states = random_tokens(1, 40, "cuda"), [], []
    with torch.inference_mode():
        wanted = exact(tokens).logits[0, 3:].float()
        modules = model(tokens).logits[0, 3:].float()
        for _ in range(2):
            cache = TnlCache(model.config)
            _, position = prefill(model, tokens[:, :3], torch.ones(1, 3, device="cuda"), cache)
            states = [layer.state.clone() for layer in cache.layers if layer.state is not None]
            step, each = make_step(model, states), []
            logits = torch.full((1, model.config.vocab_size), torch.nan, device="cuda", dtype=dtype)
            for token in tokens[:, 3:].T:
                step(token.contiguous(), position, logits)
                each.append(logits[0].float())
            results.append(torch.stack(each))
            assert position.item() == tokens.shape[1]
        final = TnlCache(exact.config)
        exact(tokens, past_key_values=final)
    allowed = 2 * (modules - wanted).norm()
    for result in results:
        assert (result - wanted).norm() <= allowed
    assert (results[0] - results[1]).norm() <= allowed / 2
    for state, layer in zip(states, final.layers, strict=True):
        assert layer.state is not None
        assert (state - layer.state).norm() <= 0.05 * layer.state.norm()


def test_what_is_not_served_is_refused() -> None:
    model = small_model()
    states = [torch.zeros(1, *model.config.state_shape(layer)) for layer in range(3)]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device: expected an NVIDIA GPU of compute capability 9\.0"):
            make_step(model, states)
        return
    device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"(device|dtype): expected"):
        make_step(model.cuda(), [state.cuda() for state in states])
    if torch.cuda.get_device_capability()[0] >= 9:
        assert "width: expected one of" in (why_not(device, torch.float16, 24, 2, 12) or "")
        assert "head_dim: expected a multiple of 32" in (why_not(device, torch.float16, 1024, 64, 16) or "")
        assert "heads: expected" in (why_not(device, torch.float16, 1024, 1, 128) or "")
        wrong = small_model("cuda", **SIZES).half()
        with pytest.raises(ValueError, match=r"layers\[0\].state: expected contiguous"):
            make_step(wrong, [torch.zeros(1, 8, 128, 128, device="cuda") for _ in range(3)])
