"""Layers: all variants against a definition that goes token by token, positions, compilation. Tier T0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_models import HYBRID, logits_of, random_tokens, small_model
from tnl.models import TnlForCausalLM
from tnl.slopes import log_decay

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "1+elu": lambda x: torch.where(x > 0, 1 + x, x.exp()),
    "none": lambda x: x,
}


class Definition:
    """The architecture one token and one head at a time, in float64."""

    def __init__(self, model: TnlForCausalLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.config.norm_type == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return x * self.weights.get(f"{name}.weight", 1) + self.weights.get(f"{name}.bias", 0)

    def project(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def attention(self, x: Tensor, name: str, layer: int, decays: Tensor) -> Tensor:
        heads, key_width, width = self.config.state_shape(layer)
        q, k, v, *gate = self.project(x, f"{name}.qkvu_proj").split(heads * width, dim=-1)
        q, k = ACTIVATIONS[self.config.hidden_act](q), ACTIVATIONS[self.config.hidden_act](k)
        v = ACTIVATIONS[self.config.value_act](v)
        output = torch.zeros_like(v)
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            state = torch.zeros(key_width, width, dtype=torch.float64)
            for t in range(len(x)):
                q_t, k_t = q[t, columns], k[t, columns]
                if self.config.uses_lrpe(layer):
                    angle = self.weights[f"{name}.lrpe.theta"][h, 0] * t
                    q_t = torch.cat([q_t * angle.cos(), q_t * angle.sin()])
                    k_t = torch.cat([k_t * angle.cos(), k_t * angle.sin()])
                state = decays[h] * state + torch.outer(k_t, v[t, columns])
                output[t, columns] = q_t @ state
        output = self.norm(output, f"{name}.norm")
        if self.config.gate == "linear":
            output = output * gate[0]
        elif self.config.gate == "sigmoid":
            output = output * gate[0].sigmoid()
        elif self.config.gate == "low_rank_sigmoid":
            low = self.project(x, f"{name}.gate_down_proj")
            output = output * self.project(low, f"{name}.gate_up_proj").sigmoid()
        return self.project(output, f"{name}.o_proj")

    def softmax_attention(self, x: Tensor, name: str) -> Tensor:
        heads, _, width = self.config.state_shape(0)
        q, k, v = self.project(x, f"{name}.qkv_proj").split(heads * width, dim=-1)
        frequency = self.config.rope_theta ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
        output = torch.zeros_like(v)
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
            rotation = torch.polar(torch.ones_like(angle), angle)
            q_h, k_h = (
                torch.view_as_real(torch.complex(*y[:, columns].chunk(2, dim=-1)) * rotation).flatten(1) for y in (q, k)
            )
            for t in range(len(x)):
                weights = (k_h[: t + 1] @ q_h[t] / width**0.5).softmax(0)
                output[t, columns] = weights @ v[: t + 1, columns]
        return self.project(output, f"{name}.o_proj")

    def logits(self, ids: Tensor) -> Tensor:
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        decays = log_decay(self.config.decay_schedule, layers, heads).double().exp()
        x = self.config.hidden_size**0.5 * self.weights["model.embed_tokens.weight"][ids]
        for i in range(layers):
            name = f"model.layers.{i}"
            normed = self.norm(x, f"{name}.attention_norm")
            if self.config.is_linear(i):
                x = x + self.attention(normed, f"{name}.attention", i, decays[i])
            else:
                x = x + self.softmax_attention(normed, f"{name}.attention")
            normed = self.norm(x, f"{name}.mlp_norm")
            gated = ACTIVATIONS[self.config.glu_act](self.project(normed, f"{name}.mlp.gate_proj"))
            x = x + self.project(gated * self.project(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        return self.project(self.norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize(
    "variant",
    [
        *[{"lrpe_layers": choice} for choice in ("first", "all", "none")],
        *[{"decay_schedule": choice} for choice in ("paper", "uniform", "none")],
        *[{"gate": choice} for choice in ("sigmoid", "low_rank_sigmoid", "none")],
        *[{"hidden_act": choice} for choice in ("relu", "gelu", "sigmoid", "1+elu", "none")],
        *[{"norm_type": choice} for choice in ("rms", "layer")],
        {"value_act": "silu"},
        {"glu_act": "silu"},
        {"head_dim": 5},
        {"layer_types": HYBRID},
    ],
    ids=lambda variant: "-".join(f"{key}={value}" for key, value in variant.items())[:40],
)
def test_definition(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # so that a weight or bias that is not applied is seen
                parameter.add_(torch.randn_like(parameter) / 4)
    input_ids = random_tokens(2, 19)
    expected = torch.stack([Definition(model).logits(row) for row in input_ids])
    torch.testing.assert_close(logits_of(model, input_ids).double(), expected, rtol=1e-4, atol=1e-4)
    pieces = [logits_of(model, row[None]) for row in input_ids]  # and a row of a batch is what it is alone
    torch.testing.assert_close(torch.cat(pieces).double(), expected, rtol=1e-4, atol=1e-4)


def test_lrpe_is_relative_and_exact_far_away() -> None:
    model = small_model(lrpe_layers="all")
    input_ids = random_tokens(1, 30)
    positions = torch.arange(30)[None]
    near, far = (logits_of(model, input_ids, position_ids=positions + shift) for shift in (0, 3_000_000))
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)


def test_decoder_layer_compiles_without_a_graph_break() -> None:
    model = small_model().train()
    layer = model.model.layers[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    decay = model.model.log_decay(torch.device("cpu"))[0]
    hidden_states = torch.randn(2, 8, 24)
    positions = torch.arange(8)[None]
    boundaries = torch.tensor([0, 3, 16], dtype=torch.int32)
    for arguments in ({}, {"cu_seqlens": boundaries}, {"padding_mask": torch.ones(2, 8)}):
        inputs = [hidden_states.clone().requires_grad_() for _ in range(2)]
        outputs = [f(x, decay, positions, **arguments) for f, x in zip((layer, compiled), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
