"""Rows of text for second moments and for measuring quality."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tnl.training.config import as_list
from tnl.training.data import DATASETS_PREFIX, list_files, read_documents
from tnl.training.rows import IGNORED
from tnl.training.tokenizer import TextEncoder

BYTES_PER_TOKEN = 12  # a piece of a document is taken this long, so that it has enough tokens


@dataclass(frozen=True)
class Rows:
    """Rows of tokens from random places of a text.

    Attributes:
        tokens: `[N, T]` int64.
        bytes_per_token: UTF-8 bytes of the text over its tokens.
    """

    tokens: Tensor
    bytes_per_token: float

    def split(self, first: int) -> tuple["Rows", "Rows"]:
        """The first rows and the others."""
        return Rows(self.tokens[:first], self.bytes_per_token), Rows(self.tokens[first:], self.bytes_per_token)


def read_rows(sources: str | list[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> Rows:
    """Rows from places drawn over all documents of the sources, as many from each.

    Raises:
        ValueError: There is less text than one row.
    """
    encoder, generator = TextEncoder(tokenizer), np.random.default_rng(seed)
    wanted = as_list(sources)
    files = sum(1 if source.startswith(DATASETS_PREFIX) else len(list_files(source)) for source in wanted)
    each = -(-count // max(1, files))
    rows: list[Tensor] = []
    text_bytes = tokens = 0
    for document in read_documents(wanted, None, "text", Counter()):
        content = document.content.encode() if isinstance(document.content, str) else document.content
        for start in generator.integers(0, max(1, len(content) - BYTES_PER_TOKEN * length), size=each):
            piece = content[start : start + BYTES_PER_TOKEN * length].decode(errors="ignore").encode()
            (ids,) = encoder.encode([piece])
            ids = ids[1 : len(ids) - (encoder.end is not None)]
            text_bytes, tokens = text_bytes + len(piece), tokens + len(ids)
            if len(ids) >= length:
                rows.append(torch.from_numpy(ids[:length].astype(np.int64)))
        if len(rows) >= count and any(source.startswith(DATASETS_PREFIX) for source in wanted):
            break
    if not rows:
        raise ValueError(f"data: expected text of at least {length} tokens, found less in {wanted}")
    order = generator.permutation(len(rows))[:count]
    return Rows(torch.stack([rows[place] for place in order]), text_bytes / tokens)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, rows: Rows, batch: int, advance: Callable[[int], object]) -> float:
    """Mean loss of predicted tokens in bits, over the bytes of a token."""
    nats = 0.0
    for tokens in rows.tokens.split(batch):
        given = tokens.to(model.device)
        logits = model(input_ids=given, use_cache=False).logits
        for row, targets in zip(logits[:, :-1], given[:, 1:], strict=True):  # one row of logits in float32 at a time
            nats += float(F.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="sum"))
        advance(tokens.numel())
    predicted = rows.tokens.shape[0] * (rows.tokens.shape[1] - 1)
    return nats / predicted / math.log(2) / rows.bytes_per_token
