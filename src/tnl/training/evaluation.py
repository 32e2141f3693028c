"""`tnl eval`: loss, perplexity and bits per byte of a model on documents of any length.

A TNL reads a document window by window and carries its state of constant size along: every token is predicted from
the whole document before it, in memory that does not depend on the document's length. A model without such a state
sees windows that overlap by half.

The token that opens a document is context and the one that ends it is not counted, so that bits per byte are those
of the text alone.
"""

import csv
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel

from tnl.models import TnlForCausalLM
from tnl.training.config import EvaluationSettings
from tnl.training.data import batched, read_documents
from tnl.training.model import choose_device, load_model
from tnl.training.rows import IGNORED
from tnl.training.store import TokenStore, TokenWriter
from tnl.training.tokenizer import TextEncoder


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        name: The document, or `total`.
        tokens: Predicted tokens.
        text_bytes: UTF-8 bytes.
        loss: Mean loss in nats per token.
        perplexity: exp(loss).
        bits_per_byte: Loss of the whole text in bits over its bytes.
    """

    name: str
    tokens: int
    text_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float

    @classmethod
    def of(cls, name: str, nats: float, tokens: int, text_bytes: int) -> "Score":
        """The score of a text whose tokens cost `nats` together."""
        loss = nats / max(1, tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return cls(name, tokens, text_bytes, loss, perplexity, nats / math.log(2) / max(1, text_bytes))


def run(settings: EvaluationSettings) -> None:
    """`tnl eval`: on text, or on the tasks of lm-evaluation-harness.

    Raises:
        ValueError, OSError: As :func:`evaluate` and :func:`tnl.training.harness.evaluate_tasks` do.
    """
    if settings.harness is None:
        evaluate(settings)
    else:
        from tnl.training.harness import evaluate_tasks

        evaluate_tasks(settings)


def evaluate(settings: EvaluationSettings) -> Score:
    """Score a model on the documents of the sources; print a table and write the files that the settings name.

    Raises:
        ValueError: The sources hold no text, or the model has no tokenizer.
        OSError: Model or sources cannot be read, or a result cannot be written.
    """
    console = Console(stderr=True)
    model, tokenizer = load_model(settings.model, choose_device(settings.device), settings.dtype)
    encoder = TextEncoder(tokenizer)
    skipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console, transient=True) as progress:
        writer = TokenWriter(Path(scratch) / "tokens", encoder)
        reading = progress.add_task("reading", total=None)
        sources = settings.data
        for batch in batched(read_documents(sources, settings.separator, settings.column, skipped)):
            writer.write(batch)
        progress.remove_task(reading)
        if not len(writer):
            raise ValueError(f"data: expected text, found none in {sources}")
        writer.close()
        store = TokenStore(Path(scratch) / "tokens")
        task = progress.add_task("evaluating", total=int(store.lengths.sum()))
        started = time.perf_counter()
        nats = document_nats(
            model, store, settings.window, settings.batch_size, lambda tokens: progress.advance(task, tokens)
        )
        seconds = time.perf_counter() - started
        lengths = store.lengths - 2  # without the opening and the closing token
        parts = zip(store.names(), nats, lengths, store.text_bytes, strict=True)
        scores = [Score.of(name, float(n), int(t), int(b)) for name, n, t, b in parts]
        total = Score.of("total", float(nats.sum()), int(lengths.sum()), int(store.text_bytes.sum()))
    show(settings, total, len(scores), dict(skipped), total.tokens / seconds)
    if settings.json:
        result = {"model": settings.model, "data": sources, "window": settings.window, "documents": len(scores)}
        Path(settings.json).write_text(json.dumps(result | asdict(total), indent=1) + "\n")
    if settings.csv:
        with Path(settings.csv).open("w", newline="") as file:
            table = csv.DictWriter(file, list(asdict(total)))
            table.writeheader()
            table.writerows(asdict(score) for score in scores)
    return total


@torch.inference_mode()
def document_nats(
    model: PreTrainedModel, store: TokenStore, window: int, batch_size: int, advance: Callable[[int], object]
) -> npt.NDArray[np.float64]:
    """Loss of each document in nats, its opening token given and its closing token left out.

    Args:
        model: A causal model in evaluation mode.
        store: The documents.
        window: Tokens of one forward pass.
        batch_size: Documents side by side; those of similar length go together.
        advance: Called with the number of tokens that were read since the last call.

    Returns:
        [N] float64.
    """
    nats = np.zeros(len(store))
    order = np.argsort(store.lengths, kind="stable")[::-1]
    carries_state = isinstance(model, TnlForCausalLM)
    fresh = window if carries_state else max(1, window // 2)  # tokens that each window adds
    for first in range(0, len(order), batch_size):
        documents = order[first : first + batch_size]
        longest = int(store.lengths[documents[0]]) - 2
        state: Any = None
        for start in range(0, longest, fresh):
            context = 0 if carries_state else min(start, window - fresh)
            inputs, targets = read_window(store, documents, start - context, start + fresh)
            targets[:, :context] = IGNORED
            tokens = torch.from_numpy(inputs).to(model.device)
            output = model(input_ids=tokens, past_key_values=state, use_cache=carries_state)
            state = output.past_key_values if carries_state else None
            wanted = torch.from_numpy(targets).to(model.device)
            for row, document in enumerate(documents):  # one row of logits in float32 at a time
                loss = F.cross_entropy(output.logits[row].float(), wanted[row], ignore_index=IGNORED, reduction="sum")
                nats[document] += loss.item()
        advance(int(store.lengths[documents].sum()))
    return nats


def read_window(
    store: TokenStore, documents: npt.NDArray[np.int64], start: int, stop: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens [start, stop) of each document and the tokens that follow them, both [B, stop - start] int64.

    The window ends with the longest document; behind the end of a shorter one there is token 0, with no target.
    """
    stop = min(stop, int(store.lengths[documents].max()) - 2)
    inputs = np.zeros((len(documents), stop - start), dtype=np.int64)
    targets = np.full((len(documents), stop - start), IGNORED, dtype=np.int64)
    for row, document in enumerate(documents):
        text_end = int(store.lengths[document]) - 1  # the closing token is no target
        tokens = store.tokens(int(document), start, max(start, min(stop + 1, text_end)))
        count = max(0, len(tokens) - 1)
        inputs[row, :count], targets[row, :count] = tokens[:count], tokens[1:]
    return inputs, targets


def show(settings: EvaluationSettings, total: Score, documents: int, skipped: dict[str, int], rate: float) -> None:
    """Print the totals as a table on standard output."""
    table = Table(title=settings.model)
    for column in ("documents", "tokens", "bytes", "loss", "perplexity", "bits/byte", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{documents:,}",
        f"{total.tokens:,}",
        f"{total.text_bytes:,}",
        f"{total.loss:.4f}",
        f"{total.perplexity:.3f}",
        f"{total.bits_per_byte:.4f}",
        f"{rate:,.0f}",
    )
    console = Console()
    console.print(table)
    for reason, count in sorted(skipped.items()):
        console.print(f"skipped {count} {reason}")
