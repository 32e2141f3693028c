"""Tokenizers: one token a byte (the default, needs no file), a BPE trained on the corpus, or a pretrained one.

All of them are transformers tokenizers, saved into the model folder, so that `AutoTokenizer` loads what was trained
with. `TextEncoder` turns documents into arrays of tokens, the same way for training and evaluation.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tnl.training.config import BPE, BYTES

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
LONGEST_PIECE = 1 << 20  # characters given to a tokenizer at once; longer documents are cut at a line's end


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is byte i, followed by the end of text (256) and padding (257)."""
    from tokenizers import Tokenizer, models
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    return _wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), split_words=False)


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `vocabulary_size` tokens (fewer for a small corpus), the special ones included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    smallest = 256 + 2
    if vocabulary_size < smallest:
        raise ValueError(f"tokenizer.vocabulary_size: expected at least {smallest}, got {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,  # the special tokens come last, as in the byte tokenizer
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, split_words=True)


def _wrap(tokenizer: "tokenizers.Tokenizer", split_words: bool) -> PreTrainedTokenizerFast:  # type: ignore[name-defined]  # noqa: F821
    """Add the special tokens, the byte-level steps and the leading end-of-text token to a BPE model."""
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PADDING, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # what batched generation wants
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The byte tokenizer for `bytes`, otherwise the pretrained tokenizer in a folder or on the hub.

    Raises:
        ValueError: There is no tokenizer under this name.
    """
    if name == BYTES:
        return byte_tokenizer()
    if name == BPE:
        raise ValueError("tokenizer.name: expected bytes or a pretrained tokenizer, got bpe without a corpus")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokenizer.name: expected {BYTES}, {BPE} or a tokenizer, got {name!r} ({reason})") from None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that decides the tokens of a text."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description.pop("padding"), description.pop("truncation")  # both change while a tokenizer is used
    else:
        description = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


class TextEncoder:
    """Turns documents into tokens: the first token of a document is its context, the last one says that it ends.

    Attributes:
        tokenizer: The tokenizer; its beginning-of-text token (or else its end-of-text token) opens a document, its
            end-of-text token closes it.
        dtype: Smallest unsigned integer type that holds every token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        self.begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end
        if self.begin is None:
            raise ValueError("tokenizer.name: expected a tokenizer with a beginning- or end-of-text token, got none")
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        self.fingerprint = fingerprint(tokenizer)
        self._bytes_are_tokens = self.fingerprint == fingerprint(byte_tokenizer())

    def encode(self, contents: list[bytes | str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """Tokens of each document, framed.

        The byte tokenizer keeps bytes that are not UTF-8, for any other they become U+FFFD. A special token that is
        written out in a text is text.
        """
        if self._bytes_are_tokens:
            return [
                self._frame(np.frombuffer(c.encode() if isinstance(c, str) else c, dtype=np.uint8)) for c in contents
            ]
        return [self._frame(np.array(ids, dtype=self.dtype)) for ids in self._encode_texts(contents)]

    def _frame(self, ids: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        framed = np.empty(len(ids) + 1 + (self.end is not None), dtype=self.dtype)
        framed[0] = self.begin
        framed[1 : len(ids) + 1] = ids
        if self.end is not None:
            framed[-1] = self.end
        return framed

    def _encode_texts(self, contents: list[bytes | str]) -> Iterator[list[int]]:
        texts = [c if isinstance(c, str) else c.decode("utf-8", errors="replace") for c in contents]
        pieces = [list(_cut(text)) for text in texts]
        flat = [piece for document in pieces for piece in document]
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            backend = self.tokenizer.backend_tokenizer
            backend.encode_special_tokens = True
            encoded = [e.ids for e in backend.encode_batch(flat, add_special_tokens=False)]
            backend.encode_special_tokens = False
        else:
            encoded = [
                self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True) for piece in flat
            ]
        position = 0
        for document in pieces:
            yield [token for ids in encoded[position : position + len(document)] for token in ids]
            position += len(document)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most LONGEST_PIECE characters, cut before the last run of white space that a piece has."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        piece = text[start : start + LONGEST_PIECE]
        spaces = [match.start() for match in re.finditer(r"\s+", piece[-4096:])]
        stop = start + LONGEST_PIECE - 4096 + spaces[-1] if spaces and LONGEST_PIECE > 4096 else start + LONGEST_PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]
