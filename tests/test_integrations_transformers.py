"""MiniMax of transformers on the operator: the same outputs, gradients and cache as without it. Tier T0."""

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from tests.numerics import relative_error
from tnl.integrations.transformers import accelerate_minimax, restore_minimax

CONFIG = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 2, "block_size": 8, "pad_token_id": 0, "head_dim": 12,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**CONFIG)).eval()
    return theirs, accelerate_minimax(copy.deepcopy(theirs))


def tokens(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def caches(outputs: Any) -> list[torch.Tensor]:
    return [state for state in outputs.past_key_values.linear_cache if isinstance(state, torch.Tensor)]


@pytest.mark.parametrize("length", [1, 8, 21])
def test_prefill_and_decode(length: int) -> None:
    """Logits and states of a prompt, of one token more, and of several at once behind a prompt."""
    theirs, ours = models()
    prompt = tokens(length=length)
    with torch.no_grad():
        expected, actual = theirs(prompt, use_cache=True), ours(prompt, use_cache=True)
        for more in (tokens(length=1), tokens(length=5)):
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
            assert len(caches(actual)) == 3
            for mine, other in zip(caches(actual), caches(expected), strict=True):
                assert mine.dtype == other.dtype
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
            expected = theirs(more, use_cache=True, past_key_values=expected.past_key_values)
            actual = ours(more, use_cache=True, past_key_values=actual.past_key_values)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_cache_goes_from_one_to_the_other() -> None:
    theirs, ours = models()
    with torch.no_grad():
        cache = theirs(tokens(), use_cache=True).past_key_values
        mine, other = (
            model(tokens(length=3), past_key_values=copy.deepcopy(cache), use_cache=True).logits
            for model in (ours, theirs)
        )
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    theirs, ours = models()
    prompt = tokens()
    mask = torch.ones_like(prompt)
    mask[0, slice(0, 6) if side == "left" else slice(15, None)] = 0
    prompt[mask == 0] = 0
    with torch.no_grad():
        expected, actual = (model(prompt, attention_mask=mask).logits for model in (theirs, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_generation() -> None:
    theirs, ours = models()
    prompt = tokens()
    mask = torch.ones_like(prompt)
    mask[0, :6] = 0
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True)
    expected, actual = (m.generate(prompt, attention_mask=mask, generation_config=settings) for m in (theirs, ours))
    assert torch.equal(actual, expected)


def test_gradients() -> None:
    theirs, ours = models()
    gradients = []
    for model in (theirs, ours):
        model.train()
        loss = model(tokens(), labels=tokens()).loss
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for mine, other in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(mine, other) < 1e-5


def test_sixteen_bits() -> None:
    """As close to the layer in float64 as the layer that it replaces; the state in float32."""
    torch.manual_seed(0)
    theirs = MiniMaxLightningAttention(MiniMaxConfig(**CONFIG), 1).bfloat16()
    ours, exact = accelerate_minimax(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    factors = exact.decay_factors(exact.slope_rate)  # of the slopes as rounded to 16 bits, not rounded again
    exact.query_decay, exact.key_decay, exact.diagonal_decay = factors
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        (reference, _), (other, _), (o, state) = exact(x.double(), None, None), theirs(x, None, None), ours(x)
    error, allowed = ((output.double() - reference).norm() for output in (o, other))
    assert error <= 2 * allowed
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_undo() -> None:
    theirs, ours = models()
    kinds = [type(module) for module in theirs.modules()]
    assert [type(module) for module in ours.modules()] != kinds
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert accelerate_minimax(ours) is ours  # once more changes nothing
    assert [type(module) for module in restore_minimax(ours).modules()] == kinds
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_model_without_such_layers() -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model: expected a transformers model with layers of MiniMax's"):
        accelerate_minimax(LlamaForCausalLM(config))
