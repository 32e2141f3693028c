"""Scores of documents: whole = in windows = in batches; another model in overlapping windows. Tier T0."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.evaluation import Score, document_nats
from tnl.training.store import Document, TokenStore, TokenWriter
from tnl.training.tokenizer import TextEncoder, byte_tokenizer

CONTENTS = [b"a", b"\xff\x00\xfe", b"def f(x):\n    return x\n" * 3, b"z" * 61, "é漢🙂".encode() * 9]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("store") / "tokens"
    writer = TokenWriter(folder, TextEncoder(byte_tokenizer()))
    writer.write([Document(str(i), content) for i, content in enumerate(CONTENTS)])
    writer.close()
    return TokenStore(folder)


@pytest.fixture(scope="module")
def tnl_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return TnlForCausalLM(TnlConfig.from_preset("tiny", vocab_size=258, initializer_range=0.2, **sizes)).double().eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=258, intermediate_size=48, initializer_range=0.2, **sizes)
    return AutoModelForCausalLM.from_config(config).double().eval()


@torch.no_grad()
def nats_of_tokens(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of every token but the first, in one forward pass without cache."""
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits, tokens[1:], reduction="none")


def text_tokens(store: TokenStore, document: int) -> torch.Tensor:
    return torch.from_numpy(store.tokens(document)[:-1].astype(np.int64))


@pytest.mark.parametrize("window", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_state_carries_the_whole_document(
    store: TokenStore, tnl_model: PreTrainedModel, window: int, batch_size: int
) -> None:
    longest_input = 0

    def note(module: object, arguments: object, keywords: dict[str, torch.Tensor]) -> None:
        nonlocal longest_input
        longest_input = max(longest_input, keywords["input_ids"].shape[1])

    hook = tnl_model.register_forward_pre_hook(note, with_kwargs=True)
    read: list[int] = []
    nats = document_nats(tnl_model, store, window, batch_size, read.append)
    hook.remove()
    expected = [nats_of_tokens(tnl_model, text_tokens(store, i)).sum().item() for i in range(len(store))]
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    assert longest_input == min(window, max(map(len, CONTENTS)))
    assert sum(read) == store.lengths.sum()


def test_other_models_see_overlapping_windows(store: TokenStore, llama: PreTrainedModel) -> None:
    nats = document_nats(llama, store, 8, 2, lambda tokens: None)
    for document in range(len(store)):
        tokens = text_tokens(store, document)
        expected = 0.0
        for start in range(0, len(tokens) - 1, 4):
            context = min(start, 4)
            piece = tokens[start - context : start + 5]
            expected += nats_of_tokens(llama, piece)[context:].sum().item()
        assert nats[document] == pytest.approx(expected, rel=1e-5)
    whole = document_nats(llama, store, 1000, 2, lambda tokens: None)
    assert whole[3] != pytest.approx(nats[3], rel=1e-3)


def test_score_of_a_uniform_model(store: TokenStore, tnl_model: PreTrainedModel) -> None:
    """A model that knows nothing of 258 tokens needs log2(258) bits for each byte."""
    blank = TnlForCausalLM(tnl_model.config).eval()
    for parameter in blank.parameters():
        torch.nn.init.zeros_(parameter)
    nats = document_nats(blank, store, 16, 2, lambda tokens: None)
    total = Score.of("total", nats.sum(), int((store.lengths - 2).sum()), int(store.text_bytes.sum()))
    assert total.tokens == total.text_bytes == sum(map(len, CONTENTS))
    assert total.bits_per_byte == pytest.approx(math.log2(258))
    assert total.perplexity == pytest.approx(258, rel=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_document(tmp_path: Path, tnl_model: PreTrainedModel) -> None:
    """What the model keeps between windows is one state, whatever came before."""
    writer = TokenWriter(tmp_path / "tokens", TextEncoder(byte_tokenizer()))
    writer.write([Document("long", b"0123456789" * 20_000)])
    writer.close()
    sizes: set[int] = set()

    def note(module: object, arguments: object, output: dict[str, object]) -> None:
        layers = output["past_key_values"].layers  # type: ignore[attr-defined]
        sizes.add(sum(layer.state.numel() for layer in layers))

    hook = tnl_model.register_forward_hook(note)
    nats = document_nats(tnl_model, TokenStore(tmp_path / "tokens"), 4096, 1, lambda tokens: None)
    hook.remove()
    assert len(sizes) == 1
    assert np.isfinite(nats).all()
