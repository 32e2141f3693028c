"""Second moments of inputs and of gradients at outputs. Tier T0."""

import torch
from torch import Tensor, nn

from tnl.compression.moments import Moments, combined, gather_moments
from tnl.models import TnlConfig, TnlForCausalLM


def make_model() -> TnlForCausalLM:
    torch.manual_seed(0)
    config = TnlConfig.from_preset("tiny", vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
                                   intermediate_size=24, tie_word_embeddings=False)  # fmt: skip
    return TnlForCausalLM(config).double().eval()


def test_moments_are_those_of_the_definition() -> None:
    model = make_model()
    batches = list(torch.randint(0, 40, (3, 2, 10)))
    names = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"]
    seen: list[int] = []
    moments = gather_moments(model, names, batches, seen.append)
    assert seen == [20, 20, 20]

    inputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(given[0].detach())
        output.register_hook(gradients.append)

    handle = model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(keep)
    for tokens in batches:
        output = model(input_ids=tokens, use_cache=False).logits
        losses = nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        losses.backward()
    handle.remove()
    x, g = (torch.cat(parts).flatten(0, 1) for parts in (inputs, gradients))
    torch.testing.assert_close(moments[names[1]].columns, x.T @ x / len(x))
    torch.testing.assert_close(moments[names[1]].rows, g.T @ g / len(g))
    counts = torch.bincount(torch.stack(batches).flatten(), minlength=40) / 60
    torch.testing.assert_close(moments[names[0]].rows, counts.double())
    assert moments[names[0]].columns.shape == (16, 16)
    assert moments["lm_head"].rows.shape == (40, 40)


def test_model_is_left_as_it_was() -> None:
    model = make_model()
    gather_moments(model, ["lm_head"], [torch.randint(0, 40, (1, 5))], lambda _: None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_combined_moments_have_the_trace_of_both() -> None:
    first = Moments(torch.rand(6, dtype=torch.float64), torch.eye(3, dtype=torch.float64) * 2)
    second = Moments(torch.eye(6, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64))
    both = combined(first, second)
    cost = first.rows.sum() * first.columns.trace() + second.rows.trace() * second.columns.trace()
    torch.testing.assert_close(both.rows.trace() * both.columns.trace(), cost)
    alone = combined(first, Moments(torch.zeros(6).double(), torch.zeros(3, 3).double()))
    torch.testing.assert_close(alone.rows[:, None, None] * alone.columns, first.rows[:, None, None] * first.columns)
