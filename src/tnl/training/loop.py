"""The training loop of `tnl train`, from the settings to a Hugging Face folder; `train` reads top to bottom.

The loss of a step is the sum over the predicted tokens of all rows, processes and micro-batches, divided by their
number, so that neither processes nor micro-batches change what is computed.
"""

import contextlib
import dataclasses
import inspect
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tnl.training import parallel
from tnl.training.checkpoint import Checkpoints, differences, read_record
from tnl.training.config import OptimizerSettings, TrainSettings, make_folder, require
from tnl.training.data import Corpus, describe_skipped, prepare_corpus, prepare_tokenizer
from tnl.training.flops import flops_per_token, matrix_parameters, peak_flops
from tnl.training.model import build_model, fill_model, keeps_documents_apart, save_model
from tnl.training.parallel import Ranks, join_ranks
from tnl.training.report import Report, memory_gib
from tnl.training.rows import IGNORED, Batch, PackedRows, RowSampler, collate, make_loader, make_rows
from tnl.training.tokenizer import TextEncoder

SECONDS_BETWEEN_PLOTS = 30.0  # a plot takes longer than many a step


@dataclass
class Progress:
    """Where a run stands: steps done, tokens predicted, steps skipped (of them in a row), seconds spent in steps."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """What a run consists of; `assemble` puts it together."""

    settings: TrainSettings
    ranks: Ranks
    report: Report
    checkpoints: Checkpoints
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    sampler: RowSampler
    loader: Any  # a StatefulDataLoader
    identity: dict[str, Any]  # what a checkpoint must agree with
    token_flops: float  # operations of forward and backward pass for one token
    progress: Progress

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step in one process."""
        return self.settings.batch_size // (self.sampler.micro_batch_size * self.ranks.data[1])


@dataclass
class StepResult:
    """What a step gives: mean loss in nats per token, gradient norm, predicted tokens, whether to stop."""

    loss: float
    gradient_norm: float
    tokens: int
    stop: bool


def train(settings: TrainSettings) -> Path | None:
    """Train a model and write it.

    SIGTERM and SIGINT let the step finish and write a checkpoint.

    Returns:
        The model's Hugging Face folder, None for a run that was stopped by a signal.

    Raises:
        ValueError: Settings that contradict each other, the data, or the checkpoint to resume from.
        OSError: A source that cannot be read, or a folder that cannot be written.
        FloatingPointError: Too many steps in a row without a finite loss and gradient.
    """
    with join_ranks(settings.device, settings.parallel.context) as ranks, catch_stop_signals() as stop:
        run = assemble(settings, ranks)
        report, progress = run.report, run.progress
        batches = restore(run, settings.resume)
        with report.started(progress.step):
            report.say(describe(run))
            interval = Interval()
            while progress.step < settings.steps:
                step = progress.step + 1
                with interval.timed("step"):
                    with interval.timed("wait"):
                        rows = [next(batches) for _ in range(run.micro_batches)]
                    result = take_step(run, step, rows, stop)
                progress.step = step
                progress.tokens += result.tokens
                progress.seconds += interval.last
                interval.tokens += result.tokens
                report.advance(step)

                row: dict[str, Any] = {}
                if is_due(step, settings.log_every, settings.steps) or result.stop:
                    row = {"loss": result.loss, "gradient_norm": result.gradient_norm} | interval.rates()
                    row["learning_rate"] = learning_rate(settings.optimizer, step, settings.steps)
                    row["memory_gib"] = memory_gib(ranks.device.type)
                    row |= flops_use(run, row["tokens_per_second"])
                    interval = Interval()
                if is_due(step, settings.evaluate_every, settings.steps) and run.corpus.held_out is not None:
                    row["held_out_loss"] = held_out_loss(run)
                if row:
                    report.log(dataclasses.asdict(progress) | row)
                if is_due(step, settings.checkpoint_every, settings.steps) or result.stop:
                    save(run)
                    report.draw(0.0 if result.stop else SECONDS_BETWEEN_PLOTS)
                if result.stop and step < settings.steps:
                    run.checkpoints.finish()
                    report.say(f"stopped by a signal after step {step}: go on with --resume")
                    return None
            run.checkpoints.finish()
            folder = Path(settings.output) / "model"
            export(run, folder)
            report.draw()
            report.say(f"wrote {folder}")
    return folder


def assemble(settings: TrainSettings, ranks: Ranks) -> Run:
    """Prepare data, model, optimiser and loader, the same in every process."""
    output = Path(settings.output)
    report = Report(settings, active=ranks.is_first)
    checkpoints = Checkpoints(
        output / "checkpoints", settings.keep_checkpoints, ranks, report.say, settings.asynchronous_checkpoints
    )
    refuse_to_overwrite(checkpoints, settings)
    micro_batch_size = choose_micro_batch(settings, ranks)

    if ranks.is_first:
        make_folder("output", output)
    with ranks.first_one_first():  # the others find what the first one wrote
        tokenizer = prepare_tokenizer(settings.tokenizer, settings.data, output / "data")
        encoder = TextEncoder(tokenizer)
        corpus = prepare_corpus(settings.data, encoder, output / "data", settings.seed)
    sampler = RowSampler(micro_batch_size, *ranks.data)
    rows = make_rows(corpus, settings.sequence_length, settings.seed, ranks.context)
    loader = make_loader(rows, sampler, settings.data.workers)

    model, weights = build_model(settings.model, tokenizer, settings.sequence_length)
    identity = identify(settings, model, corpus)
    token_flops = flops_per_token(matrix_parameters(model), model.config, settings.sequence_length)
    parallel.lay_out(model, settings.parallel, ranks)
    torch.manual_seed(settings.seed)
    fill_model(model, weights, ranks.device)
    with parallel.autocast(settings.parallel, ranks), torch.compiler.set_stance("force_eager"):
        # Layers that share rows between processes keep documents apart, which 8 tokens could not show.
        if ranks.grid is None and not keeps_documents_apart(model):
            report.say(f"warning: {type(model).__name__} lets the documents of a row see each other")
    parallel.shard_again(model)
    optimizer = make_optimizer(model, settings.optimizer)
    if ranks.is_first:
        (output / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    return Run(
        settings, ranks, report, checkpoints, tokenizer, corpus, model.train(), optimizer, sampler, loader, identity,
        token_flops, Progress(),
    )  # fmt: skip


def restore(run: Run, resume: bool) -> Iterator[Batch]:
    """Put a run where its newest complete checkpoint was, if it is to resume; the micro-batches from there on.

    Raises:
        ValueError: The checkpoint is of another run.
    """
    path = run.checkpoints.newest() if resume else None
    if path is None:
        if resume:
            run.report.say(f"no checkpoint in {run.checkpoints.folder}: starting from the beginning")
        return iter(run.loader)
    record = read_record(path)
    changes = differences(record["identity"], run.identity)
    if changes:
        raise ValueError(f"cannot resume from {path}, which is of another run: {'; '.join(changes)}")
    run.progress.__dict__.update(record["progress"])
    now = (run.ranks.size, run.settings.parallel.context, run.settings.data.workers)
    if (record["ranks"], record["context"], record["workers"]) == now:
        run.loader.load_state_dict(record["loader"][run.ranks.rank])
    else:  # each process reads other rows than before, all of them together go on where they were
        run.sampler.rows_taken = record["rows_taken"]
    batches = iter(run.loader)
    run.checkpoints.load(path, record, run.model, run.optimizer)  # last: the loader draws random numbers
    run.report.say(f"resumed from {path}")
    return batches


def take_step(run: Run, step: int, batches: list[Batch], stop: threading.Event) -> StepResult:
    """One optimiser step over the micro-batches of all processes; skipped unless loss and gradient are finite."""
    settings, ranks, progress = run.settings, run.ranks, run.progress
    # The number of predicted tokens of all processes comes first: every micro-batch divides by it.
    tokens = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
    counts = ranks.sum(torch.tensor([tokens, int(stop.is_set()), int(run.checkpoints.failed)]))
    tokens, stops, failures = counts.tolist()
    if failures:
        run.checkpoints.finish()  # raises, in all processes at the same step
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(batches, start=1):
        parallel.exchange_gradients(run.model, number == len(batches))
        part = mean_loss(run, batch, tokens)
        (part * ranks.size).backward()  # FSDP2 takes the mean over the processes
        loss += part.detach()
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    gradient_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    mean = ranks.sum(loss).item()
    if math.isfinite(mean) and math.isfinite(gradient_norm):
        if settings.optimizer.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, settings.optimizer.clip_norm, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(settings.optimizer, step, settings.steps)
        run.optimizer.step()
        progress.skipped_in_a_row = 0
    else:
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        seen = f"loss {mean}, gradient norm {gradient_norm}{name_gradients(run.model)}"
        run.report.say(f"skipped step {step}: {seen}")
        if progress.skipped_in_a_row >= settings.max_skipped_steps:
            run.checkpoints.finish()
            good = run.checkpoints.newest() or "none was written"
            raise FloatingPointError(
                f"loss or gradient was not finite in {progress.skipped_in_a_row} steps in a row, at step {step}: "
                f"{seen}; the last good checkpoint: {good}"
            )
    run.optimizer.zero_grad()
    return StepResult(mean, gradient_norm, tokens, stops > 0)


def name_gradients(model: nn.Module, most: int = 3) -> str:
    """Names the first parameters whose gradient is not finite (of several processes: in the part of this one)."""
    names = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient is not None and not gradient.isfinite().all():
            names.append(name.replace("_orig_mod.", ""))
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f", not finite in the gradients of {', '.join(names[:most])}{more}"


def mean_loss(run: Run, batch: Batch, tokens: int) -> torch.Tensor:
    """Cross-entropy of a micro-batch in nats, summed and divided by `tokens`."""
    inputs = {name: value.to(run.ranks.device, non_blocking=True) for name, value in batch.items()}
    targets = inputs.pop("targets")
    if not takes_boundaries(run.model):
        inputs.pop("cu_seq_lens_q", None)
    with parallel.autocast(run.settings.parallel, run.ranks):
        # Models of transformers compute a loss when they see labels, from shift_labels where those are given.
        return run.model(
            **inputs,
            labels=targets,
            shift_labels=targets,
            num_items_in_batch=torch.tensor(max(tokens, 1), device=targets.device),
            use_cache=False,
        ).loss


def takes_boundaries(model: PreTrainedModel) -> bool:
    """Whether a model is told the boundaries of documents as `cu_seq_lens_q`; all are told by positions."""
    return "cu_seq_lens_q" in inspect.signature(model.base_model.forward).parameters


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Mean loss in nats per token on rows spread evenly over the held-out text, the same rows each time."""
    assert run.corpus.held_out is not None
    ranks = run.ranks
    rows = PackedRows(run.corpus.held_out, run.settings.sequence_length, None, ranks.context)
    count = min(run.settings.evaluate_rows or len(rows), len(rows))
    size, (share, shares) = run.sampler.micro_batch_size, ranks.data
    sums = torch.zeros(2, dtype=torch.float64)
    run.model.eval()
    for first in range(0, count, size * shares):
        mine = range(first + share * size, first + (share + 1) * size)
        batch = collate([rows[min(i, count - 1) * len(rows) // count] for i in mine])
        # Every process takes part in every forward pass; rows beyond the last count nothing.
        batch["targets"][max(0, count - mine.start) :] = IGNORED
        sums[0] += mean_loss(run, batch, 1).double().cpu()
        sums[1] += (batch["targets"] != IGNORED).sum()
    run.model.train()
    total, tokens = ranks.sum(sums).tolist()
    return total / max(tokens, 1)


def save(run: Run) -> None:
    """Write a checkpoint of everything that `restore` needs."""
    progress = dataclasses.asdict(run.progress)
    record = {
        "progress": progress,
        "identity": run.identity,
        "ranks": run.ranks.size,
        "context": run.settings.parallel.context,
        "workers": run.settings.data.workers,
        "rows_taken": run.progress.step * run.settings.batch_size,
        "loader": run.ranks.gather(run.loader.state_dict()),
    }
    run.checkpoints.save(run.progress.step, record, run.model, run.optimizer)


def export(run: Run, folder: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder."""
    state: Any = None
    if run.ranks.mesh is not None:
        state = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        tied = {name for name, _ in run.model.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in run.model.named_parameters()}
        state = {name: value for name, value in state.items() if name not in tied}
    if run.ranks.is_first:
        save_model(run.model, run.tokenizer, folder, state)
    run.ranks.wait()


# ------------------------------------------------------------------------------------------- parts of the set-up


def refuse_to_overwrite(checkpoints: Checkpoints, settings: TrainSettings) -> None:
    """A new run does not begin in the folder of another.

    Raises:
        ValueError: The folder holds checkpoints and the run is not to resume.
    """
    newest = None if settings.resume else checkpoints.newest()
    if newest is not None:
        raise ValueError(f"output: expected a folder without checkpoints, or --resume, got {newest.parent.parent}")


def choose_micro_batch(settings: TrainSettings, ranks: Ranks) -> int:
    """Rows in one forward pass of one process.

    Raises:
        ValueError: `batch_size` is not a multiple of what the processes take at once, or several rows at a time are
            to be shared.
    """
    shares = ranks.data[1]
    shared = ranks.grid is not None
    require(
        "micro_batch_size", settings.micro_batch_size, not shared or settings.micro_batch_size <= 1,
        "1 (or 0) where processes share a row",
    )  # fmt: skip
    size = 1 if shared else settings.micro_batch_size or max(1, settings.batch_size // shares)
    require(
        "batch_size", settings.batch_size, settings.batch_size % (size * shares) == 0,
        f"a multiple of {size * shares} ({shares} processes times micro-batches of {size})",
    )  # fmt: skip
    return size


def identify(settings: TrainSettings, model: PreTrainedModel, corpus: Corpus) -> dict[str, Any]:
    """What decides the course of a run and may not change when it resumes."""
    config = model.config.to_diff_dict()
    for name in ("transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    return {
        "model": config,
        "tokenizer": corpus.train.index["tokenizer"],
        "data": {name: corpus.train.index[name] for name in ("documents", "tokens", "digest")},
        "mixture": {store.index["digest"]: share for store, share in corpus.mixture},
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
    }


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not embeddings (nor a head tied to one), norms, biases, rotation angles."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.ndim != 2 or id(p) in embeddings]
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of step 1..steps: linear warm-up, then the schedule."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    match settings.schedule:
        case "cosine":
            share = settings.final_ratio + (1 - settings.final_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        case "inverse_sqrt":
            share = math.sqrt(max(1, settings.warmup_steps) / step)
        case "constant":
            share = 1.0
        case "wsd":
            left = (steps - step) / max(1.0, settings.decay_fraction * steps)
            share = settings.final_ratio + (1 - settings.final_ratio) * min(1.0, max(0.0, left))
    return settings.learning_rate * share


def describe(run: Run) -> str:
    """One line about what is trained on what."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    train, held_out = run.corpus.train.index, run.corpus.held_out
    text = f"{run.settings.model.name}: {parameters / 1e6:,.2f}M parameters on {run.ranks.size} {run.ranks.device.type}"
    if run.ranks.grid is not None:
        text += f", {run.ranks.context[1]} to a row"
    text += f" | {train['tokens']:,} tokens in {train['documents']:,} documents"
    text += f", {held_out.index['documents']:,} held out" if held_out else ", none held out"
    text += describe_skipped(run.corpus.skipped)
    step_tokens = run.settings.batch_size * run.settings.sequence_length
    return f"{text} | {run.settings.steps:,} steps of {step_tokens:,} tokens"


# ---------------------------------------------------------------------------------------------------- small things


def flops_use(run: Run, tokens_per_second: float) -> dict[str, float]:
    """Operations a second and process in units of 10^12; as a share of the device's most in bfloat16, where known."""
    flops = run.token_flops * tokens_per_second / run.ranks.size
    use = {"model_tflops": flops / 1e12}
    if run.ranks.device.type == "cuda" and run.settings.parallel.precision == "bfloat16":
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            use["model_flops_use"] = flops / peak
    return use


class Interval:
    """Time and tokens between two lines of metrics; `last` is the duration of the newest step in seconds."""

    def __init__(self) -> None:
        self.seconds = {"step": 0.0, "wait": 0.0}
        self.tokens = 0
        self.last = 0.0

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of the block to `what`."""
        started = time.perf_counter()
        yield
        self.last = time.perf_counter() - started
        self.seconds[what] += self.last

    def rates(self) -> dict[str, float]:
        """Predicted tokens a second, and the share of time spent waiting for data."""
        seconds = max(self.seconds["step"], 1e-9)
        return {"tokens_per_second": self.tokens / seconds, "data_wait": self.seconds["wait"] / seconds}


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this step."""
    return step == steps or (every > 0 and step % every == 0)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in signals:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
