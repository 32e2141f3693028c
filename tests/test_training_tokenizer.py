"""Byte tokenizer, trained BPE, framing of documents. Tier T0."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tnl.training.tokenizer as module
from tnl.training.tokenizer import TextEncoder, byte_tokenizer, fingerprint, load_tokenizer, train_bpe

BYTES = byte_tokenizer()
SENTENCES = ["the quick brown fox\n", "jumps over the lazy dog, the dog that sleeps\n", "éàü 漢字 🙂 the end\n"] * 20
BPE = train_bpe(SENTENCES, 320)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_round_trip_any_text(text: str) -> None:
    ids = BYTES(text, split_special_tokens=True).input_ids
    assert ids == [BYTES.bos_token_id, *text.encode()]
    assert BYTES.decode(ids, skip_special_tokens=True) == text


@given(st.binary())
@settings(max_examples=200, deadline=None)
def test_encoder_keeps_any_bytes(content: bytes) -> None:
    (tokens,) = TextEncoder(BYTES).encode([content])
    assert bytes(tokens[1:-1].tolist()) == content
    assert (tokens[0], tokens[-1]) == (BYTES.bos_token_id, BYTES.eos_token_id)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_saved_tokenizer_is_the_same(tokenizer: module.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Naïve café 漢字 🙂\n\tdef f(x):  return x<|endoftext|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    padded = loaded(["a", "abc"], padding=True)
    assert [sum(mask) for mask in padded.attention_mask] == [2, len(loaded("abc").input_ids)]


def test_bpe_merges_and_round_trips() -> None:
    assert len(BPE) <= 320
    text = SENTENCES[0] + SENTENCES[2]
    ids = BPE(text).input_ids
    assert len(ids) < len(text.encode()) * 0.7
    assert BPE.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(ValueError, match=r"tokenizer.vocabulary_size: expected at least 258, got 100"):
        train_bpe(SENTENCES, 100)


def test_written_out_special_token_is_text() -> None:
    text = "a<|endoftext|>b"
    for tokenizer in (BYTES, BPE):
        (tokens,) = TextEncoder(tokenizer).encode([text])
        assert tokenizer.eos_token_id not in tokens[1:-1]
        assert tokenizer.decode(tokens[1:-1].tolist()) == text


def test_encoder_equals_the_tokenizer() -> None:
    for tokenizer in (BYTES, BPE):
        for text, tokens in zip(SENTENCES, TextEncoder(tokenizer).encode(list(SENTENCES)), strict=True):
            assert tokens.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_long_documents_are_cut_at_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(SENTENCES) * 10
    (whole,) = TextEncoder(BPE).encode([text])
    monkeypatch.setattr(module, "LONGEST_PIECE", 5000)
    (cut,) = TextEncoder(BPE).encode([text])
    assert cut.tolist() == whole.tolist()
    assert len(list(module._cut("x" * 20001))) == 5


def test_invalid_utf8_becomes_replacement_characters() -> None:
    (tokens,) = TextEncoder(BPE).encode([b"ab\xffcd"])
    assert BPE.decode(tokens.tolist(), skip_special_tokens=True) == "ab\ufffdcd"


def test_fingerprint_tells_tokenizers_apart() -> None:
    assert fingerprint(BYTES) == fingerprint(byte_tokenizer())
    assert fingerprint(BYTES) != fingerprint(BPE)
    BYTES(["a", "bc"], padding=True, truncation=True, max_length=8)  # leaves traces in the tokenizer
    assert fingerprint(BYTES) == fingerprint(byte_tokenizer())


def test_unknown_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.name: expected bytes, bpe or a tokenizer"):
        load_tokenizer(str(tmp_path))
