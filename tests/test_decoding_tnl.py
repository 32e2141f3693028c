"""Fast decoding: the same tokens as `generate` gives without it (tier T0; the kernels T1; the captured graph T3)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.test_matrix_network import tiny_config
from tnl.models import TnlCache, TnlConfig, TnlForCausalLM
from tnl.models.tnl import decoding_tnl
from tnl.models.tnl.decoding_tnl import TnlDecoder, decode, prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 50


def small_model(device: str = "cpu", **changes: Any) -> TnlForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 40, "initializer_range": 0.3}
    config = TnlConfig(vocab_size=VOCABULARY, **(sizes | changes))
    return TnlForCausalLM(config).eval().to(device)


def random_tokens(rows: int, length: int, device: str = "cpu") -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


def decode_all(model: TnlForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    """Logits after each token from the third on, decoded one by one."""
    decoder, cache = TnlDecoder(model, len(tokens), **options), TnlCache(model.config)
    logits, position = prefill(model, tokens[:, :3], torch.ones_like(tokens[:, :3]), cache)
    decoder.load(cache, position)
    return torch.stack([logits, *(decoder.step(token).clone() for token in tokens[:, 3:].T)], dim=1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"lrpe_layers": "all", "decay_schedule": "none", "tie_word_embeddings": True}])
def test_steps_have_the_logits_of_the_whole(
    fused: bool, rows: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        pytest.importorskip("triton")  # only where it is not installed may the kernels be missing
        monkeypatch.setattr("tnl.ops.decode_triton.FEW_PROGRAMS", 1)  # the interpreter runs one after another
    model, tokens = small_model(DEVICE, **changes), random_tokens(rows, 6, DEVICE)
    with torch.no_grad():
        wanted = model(tokens).logits[:, 2:]
    torch.testing.assert_close(decode_all(model, tokens, fused=fused, capture=False), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"gate": "sigmoid", "norm_type": "rms"}, {"hidden_act": "relu"}])
def test_variants_go_through_the_modules(changes: dict[str, Any]) -> None:
    model, tokens = small_model(**changes), random_tokens(2, 7)
    with torch.no_grad():
        wanted = model(tokens).logits[:, 2:]
    torch.testing.assert_close(decode_all(model, tokens), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="fused: expected False"):
        TnlDecoder(model, 1, fused=True)


@pytest.mark.parametrize(("size", "most"), [("385m", 4), ("1b", 3), ("7b", 1)])
def test_rows_that_are_few(size: str, most: int) -> None:
    with torch.device("meta"):
        model = TnlForCausalLM(TnlConfig.from_preset(size))
    assert [rows for rows in range(1, 9) if decoding_tnl.few_rows(model, rows)] == list(range(1, most + 1))


@pytest.mark.parametrize("tied", [False, True])
def test_compressed_models_go_through_the_modules(tied: bool) -> None:
    torch.manual_seed(0)
    model, tokens = TnlForCausalLM(tiny_config(tied)).eval(), random_tokens(2, 7)
    with torch.no_grad():
        wanted = model(tokens).logits[:, 2:]
    torch.testing.assert_close(decode_all(model, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_refused() -> None:
    hybrid = small_model(layer_types=["linear_attention", "full_attention", "linear_attention"])
    with pytest.raises(ValueError, match="model: expected linear attention in all layers"):
        TnlDecoder(hybrid, 1)
    with pytest.raises(ValueError, match="num_beams"):
        small_model().generate(random_tokens(1, 4), max_new_tokens=3, num_beams=2, custom_generate=decode)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="capture: expected False on cpu"):
            TnlDecoder(small_model(), 1, capture=True)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
        {"do_sample": False, "eos_token_id": [11, 12, 13, 14, 15, 16, 17, 18], "pad_token_id": 0},
    ],
)
@pytest.mark.parametrize("piece", [4, 1000])
def test_generation_gives_the_same_tokens(options: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_tnl, "PREFILL_TOKENS", piece)
    model, tokens = small_model(), random_tokens(3, 6)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0  # padding on the left
    results = []
    for custom in (None, decode):
        torch.manual_seed(7)
        results.append(
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=12,
                custom_generate=custom,
                generation_config=None,
                **options,
            )
        )
    assert torch.equal(*results)


def test_generation_goes_on_from_a_cache() -> None:
    model, tokens = small_model(), random_tokens(1, 8)
    plain = model.generate(tokens, max_new_tokens=5, do_sample=False)
    cache = TnlCache(model.config)
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache)
    given = model.generate(tokens, max_new_tokens=5, do_sample=False, past_key_values=cache, custom_generate=decode)
    assert torch.equal(given, plain)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9, dtype=torch.bool, device=input_ids.device)


def test_streamer_and_stopping_criteria() -> None:
    model, tokens, streamer = small_model(), random_tokens(1, 6), Collector()
    configuration = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
    result = model.generate(
        tokens,
        generation_config=configuration,
        token_streamer=streamer,
        stopping_criteria=[AfterThree()],
        custom_generate=decode,
    )
    assert result.shape == (1, 9)
    assert streamer.tokens == result[0].tolist()
    assert streamer.ended


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_graph(fused: bool, rows: int, dtype: torch.dtype) -> None:
    """A replay is bitwise the same step without a graph; against float32 the fused step is as good as the modules."""
    changes = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 1408, "initializer_range": 0.05}
    exact, model = (small_model("cuda", **changes).to(kind) for kind in (torch.float32, dtype))
    tokens = random_tokens(rows, 40, "cuda")
    captured = decode_all(model, tokens, fused=fused, capture=True)
    assert torch.equal(captured, decode_all(model, tokens, fused=fused, capture=False))
    with torch.no_grad():
        wanted = exact(tokens).logits[:, 2:]
    modules = decode_all(model, tokens, fused=False, capture=False)
    floor = 1e-5 * wanted.norm()
    assert (captured.float() - wanted).norm() <= 2 * (modules.float() - wanted).norm() + floor


@pytest.mark.gpu
def test_generation_on_a_gpu_gives_the_same_tokens() -> None:
    model = small_model("cuda", hidden_size=256, num_attention_heads=2, intermediate_size=704)
    tokens = random_tokens(2, 30, "cuda")
    plain, fast = (
        model.generate(tokens, max_new_tokens=64, do_sample=False, custom_generate=custom) for custom in (None, decode)
    )
    assert torch.equal(plain, fast)
