"""`tnl compress` and `tnl expand`: a trained TNL into one whose large matrices are tensor networks, and back."""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import tnss
from tnl.compression.allocation import allocate
from tnl.compression.fixed import fixed_network
from tnl.compression.matrices import Matrix, Option, dense_state, find_matrices, front, meaningful_cuts, stored
from tnl.compression.metric import Metric
from tnl.compression.moments import Moments, combined, gather_moments
from tnl.compression.report import write_report
from tnl.compression.settings import CompressSettings, ExpandSettings
from tnl.compression.spread import Call, spread
from tnl.compression.structures import (
    Finding,
    Fits,
    digest,
    family,
    foldings_of,
    save_atomically,
    search_structures,
    worth_fitting,
)
from tnl.compression.text import Rows, bits_per_byte, read_rows
from tnl.models import TnlForCausalLM
from tnl.models.tnl.matrix_network import MatrixNetwork, TensorNetworkEmbedding, TensorNetworkLinear
from tnl.training.data import describe_source
from tnl.training.model import choose_device, find_model_folder, load_model, save_model

BATCH_TOKENS = 4096  # of calibration and measuring
AROUND = (0.85, 1.0, 1.15)  # budgets around the wanted one at which networks are looked for
MEASURED_SHARE = 4  # calibration tokens for each token on which quality is measured


@dataclass
class Job:
    """What a compression works with.

    Attributes:
        settings: As given.
        model: The dense model, in float32.
        tokenizer: Its tokenizer.
        work: Folder of what has been computed.
        source: Names model and calibration text in that folder.
        progress: The display.
    """

    settings: CompressSettings
    model: TnlForCausalLM
    tokenizer: PreTrainedTokenizerBase
    work: Path
    source: str
    progress: Progress

    @contextlib.contextmanager
    def task(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A line of the display; what it gives is called with the units done since the last call."""
        number, started = self.progress.add_task(what, total=total), time.perf_counter()
        yield lambda done: self.progress.advance(number, done)
        self.progress.update(number, completed=total)
        if not self.progress.console.is_terminal:  # no display: a line for each task that is over
            self.progress.console.print(f"{what}: {total:,} in {time.perf_counter() - started:.1f} s")


def compress(settings: CompressSettings) -> Path:
    """Compress a model and write it with a report.

    Returns:
        The folder of the compressed model.

    Raises:
        ValueError: A model that is not a TNL or is compressed already, a budget that cannot be met, or no text.
        OSError: A source that cannot be read, or a folder that cannot be written.
    """
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        job = open_job(settings, progress)
        calibration, measured = read_text(job)
        names = matrix_names(job)
        budget = parameter_budget(job, names)
        moments = second_moments(job, list(names), calibration)
        matrices = describe_matrices(job, names, moments)
        fits = Fits(job.work, digest([job.source, settings.weighting, settings.damping]), settings)
        findings = add_networks(job, fits, matrices, budget)
        chosen = choose(job, matrices, budget)
        finish(job, fits, matrices, chosen)
        before = measure(job, job.model, measured, "measuring the original")
        model = build(job, matrices, chosen)
        after = measure(job, model, measured, "measuring the compressed")
        folder = Path(settings.output) / "model"
        save_model(model, job.tokenizer, folder)
    write_report(settings, matrices, chosen, findings, before, after, Path(settings.output))
    console.print(f"wrote {folder}")
    return folder


def open_job(settings: CompressSettings, progress: Progress) -> Job:
    """Load the model and open the folder of work."""
    folder = find_model_folder(settings.model)
    model, tokenizer = load_model(settings.model, choose_device(settings.device), "float32")
    if not isinstance(model, TnlForCausalLM):
        raise ValueError(f"model: expected a TNL, got {type(model).__name__} in {folder}")
    if model.config.tensor_networks:
        raise ValueError(f"model: expected a TNL with dense matrices (tnl expand makes one), got {folder}")
    if Path(settings.output).resolve() in (folder.resolve(), folder.resolve().parent):
        raise ValueError(f"output: expected another folder than the model's, got {settings.output}")
    work = Path(settings.work) if settings.work else Path(settings.output) / "work"
    work.mkdir(parents=True, exist_ok=True)
    text = [settings.data, bool(settings.held_out), settings.calibration_tokens, settings.sequence_length]
    source = digest([describe_source(str(folder)), text, settings.seed])
    return Job(settings, model, tokenizer, work, source, progress)


def read_text(job: Job) -> tuple[Rows | None, Rows | None]:
    """Rows for calibration and for measuring quality; without any text neither."""
    settings = job.settings
    length = settings.sequence_length
    count = max(1, settings.calibration_tokens // length)
    measured = max(1, count // MEASURED_SHARE)
    calibration = held_out = None
    if settings.data:
        own = 0 if settings.held_out else measured
        calibration = read_rows(settings.data, job.tokenizer, count + own, length, settings.seed)
        if own:
            calibration, held_out = calibration.split(max(1, len(calibration.tokens) - own))
    if settings.held_out:
        held_out = read_rows(settings.held_out, job.tokenizer, measured, length, settings.seed)
    return calibration, held_out if held_out is not None and len(held_out.tokens) else None


def matrix_names(job: Job) -> dict[str, str]:
    """Names and kinds of the matrices to compress."""
    found = find_matrices(job.model)
    names = {name: kind for name, kind in found.items() if kind in job.settings.kinds}
    if not names:
        there = ", ".join(dict.fromkeys(found.values()))
        raise ValueError(f"kinds: expected some of {there}, which the model has, got {job.settings.kinds}")
    return names


def parameter_budget(job: Job, names: dict[str, str]) -> int:
    """The budget as a number of parameters.

    Raises:
        ValueError: It is below what rank 1 needs everywhere.
    """
    shapes = [tuple(dense_state(job.model.get_submodule(name)).shape) for name in names]
    dense = sum(m * n for m, n in shapes)
    least = sum(m + n - int(job.settings.pinned) for m, n in shapes)
    budget = int(job.settings.budget * dense)
    if budget < least:
        raise ValueError(
            f"budget: expected at least {least / dense:.4f} (rank 1 in all {len(shapes)} matrices), "
            f"got {job.settings.budget}"
        )
    return budget


def second_moments(job: Job, names: list[str], rows: Rows | None) -> dict[str, Moments]:
    """Moments of the matrices, from the folder of work where they are there; empty without text."""
    if rows is None:
        return {}
    wanted = list(names)
    if job.model.config.tie_word_embeddings and "model.embed_tokens" in names:
        wanted.append("lm_head")
    path = job.work / f"moments-{digest([job.source, wanted])}.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            return {n: Moments(file.get_tensor(f"{n}.rows"), file.get_tensor(f"{n}.columns")) for n in wanted}
    batches = rows.tokens.split(max(1, BATCH_TOKENS // rows.tokens.shape[1]))
    with job.task("second moments", rows.tokens.numel()) as advance:
        moments = gather_moments(job.model, wanted, batches, advance)
    tensors: dict[str, Tensor] = {}
    for name, moment in moments.items():
        tensors |= {f"{name}.rows": moment.rows, f"{name}.columns": moment.columns}
    save_atomically(tensors, path)
    return moments


def describe_matrices(job: Job, names: dict[str, str], moments: dict[str, Moments]) -> list[Matrix]:
    """The matrices with their metrics."""
    settings, device = job.settings, job.model.device
    matrices = []
    for name, kind in names.items():
        weight = dense_state(job.model.get_submodule(name))
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        own = moments.get(name)
        if name == "model.embed_tokens" and "lm_head" in moments and "lm_head" not in names and own is not None:
            own = combined(own, moments["lm_head"])
        metric = Metric.of(own, shape, settings.weighting, settings.damping).to(device)
        matrices.append(Matrix(name, kind, weight, metric, *meaningful_cuts(job.model, kind, shape)))
    return matrices


def add_networks(job: Job, fits: Fits, matrices: list[Matrix], budget: int) -> list[Finding]:
    """Fit networks to the matrices, as the method says; what was found on the way."""
    settings = job.settings
    if settings.method in ("ring", "train"):
        networks = [(m, fixed_network(m, settings.method, settings.budget, settings.pinned)) for m in matrices]
        fit_networks(job, fits, [(matrix, network) for matrix, network in networks if network is not None])
        return []
    if settings.method == "svd":
        return []
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:  # matrices of a kind may differ in shape, as in hybrid stacks
        key = f"{matrix.kind} {matrix.shape}" if settings.share else matrix.name
        groups.setdefault(key, []).append(matrix)
    searched = {key: members[len(members) // 2] for key, members in groups.items()}
    pairs = [(key, folding) for key, matrix in searched.items() for folding in foldings_of(matrix, settings)]
    executor = tnss.Ray(tasks=settings.workers or None) if settings.executor == "ray" else None
    calls: list[Call] = [(search_structures, searched[key], (folding, fits, executor)) for key, folding in pairs]
    results: dict[int, tuple[Finding, Option | None]] = {}
    with job.task("searching structures", len(calls)) as advance:
        for number, result in spread(calls, workers_of(settings)):
            results[number] = result
            advance(1)
    found: dict[str, list[tuple[Finding, Option | None]]] = {key: [] for key in groups}
    for number, (key, _) in enumerate(pairs):
        found[key].append(results[number])
    choices: list[tuple[Matrix, MatrixNetwork, float]] = []
    for key, members in groups.items():
        searched[key].networks += [option for _, option in found[key] if option is not None]
        best = worth_fitting(found[key])
        if best is not None:
            sizes, ratio = family(best[0], settings), best[1]
            choices += [(matrix, network, ratio) for matrix in members for network in sizes]
    fit_networks(job, fits, promising(settings, matrices, choices, budget))
    return [finding for of_kind in found.values() for finding, _ in of_kind]


def promising(
    settings: CompressSettings, matrices: list[Matrix], choices: list[tuple[Matrix, MatrixNetwork, float]], budget: int
) -> list[tuple[Matrix, MatrixNetwork]]:
    """The networks that an allocation would choose at about this budget, were they as good as expected.

    Args:
        settings: How parameters are spent.
        matrices: All matrices.
        choices: A matrix, a network for it, and the error to expect over that of a decomposition of the same size.
        budget: Parameters.
    """
    expected: dict[str, list[Option]] = {matrix.name: matrix.options(settings.pinned) for matrix in matrices}
    for matrix, network, ratio in choices:
        size = stored(network, settings.pinned)
        error = ratio * float(matrix.spectrum.errors()[matrix.rank_within(size, settings.pinned)])
        expected[matrix.name].append(Option("network", size, error, network=network))
    wanted: dict[tuple[str, MatrixNetwork], Matrix] = {}
    for share in AROUND:
        chosen = spend(settings, matrices, list(expected.values()), int(share * budget), share * settings.budget)
        for matrix, option in zip(matrices, chosen, strict=True):
            if option.network is not None and not option.cores:
                wanted[matrix.name, option.network] = matrix
    return [(matrix, network) for (_, network), matrix in wanted.items()]


def fit_networks(job: Job, fits: Fits, wanted: list[tuple[Matrix, MatrixNetwork]]) -> None:
    """Fit each network to its matrix, and add it there."""
    calls: list[Call] = [(fits.fit, matrix, (network,)) for matrix, network in wanted]
    options: dict[int, Option] = {}
    with job.task("fitting networks", len(calls)) as advance:
        for number, option in spread(calls, workers_of(job.settings)):
            options[number] = option
            advance(1)
    for number, (matrix, _) in enumerate(wanted):  # in the order of the calls, so that a run can be repeated
        matrix.networks.append(options[number])


def finish(job: Job, fits: Fits, matrices: list[Matrix], chosen: list[Option]) -> None:
    """Fit the networks that were chosen to the end, in place."""
    places = [place for place, option in enumerate(chosen) if option.network is not None]
    calls: list[Call] = [(fits.finish, matrices[place], (chosen[place],)) for place in places]
    with job.task("finishing", len(calls)) as advance:
        for number, option in spread(calls, workers_of(job.settings)):
            chosen[places[number]] = option
            advance(1)


def workers_of(settings: CompressSettings) -> int:
    """Processes among which work on single matrices is divided."""
    return (settings.workers or os.cpu_count() or 1) if settings.executor == "joblib" else 1


def choose(job: Job, matrices: list[Matrix], budget: int) -> list[Option]:
    """An option for each matrix, within the budget."""
    settings = job.settings
    options = [matrix.options(settings.pinned) for matrix in matrices]
    if settings.method in ("ring", "train"):  # the fixed network, or a decomposition where there is no room for one
        options = [matrix.networks or choices for matrix, choices in zip(matrices, options, strict=True)]
    return spend(settings, matrices, options, budget, settings.budget)


def spend(
    settings: CompressSettings, matrices: list[Matrix], options: list[list[Option]], budget: int, share: float
) -> list[Option]:
    """An option for each matrix: within the budget together, or each within the same share of its parameters."""
    if settings.allocation == "pareto" and settings.method in ("search", "svd"):
        picks = allocate([front(choices) for choices in options], budget)
        return [choices[pick] for choices, pick in zip(options, picks, strict=True)]
    chosen = []
    for matrix, choices in zip(matrices, options, strict=True):
        most = max(int(share * matrix.weight.numel()), min(option.parameters for option in choices))
        chosen.append(min((o for o in choices if o.parameters <= most), key=lambda o: o.error))
    return chosen


def build(job: Job, matrices: list[Matrix], chosen: list[Option]) -> TnlForCausalLM:
    """The compressed model, in float32."""
    networks: dict[str, Any] = {}
    state: dict[str, Tensor] = dict(job.model.state_dict())
    for matrix, option in zip(matrices, chosen, strict=True):
        if option.kind == "dense":
            continue
        network, module_state = matrix.make(option, job.settings.pinned)
        networks[matrix.name] = network.to_dict()
        names = [matrix.name]
        if matrix.kind == "embedding" and job.model.config.tie_word_embeddings:
            names.append("lm_head")
        for name in names:
            state.pop(f"{name}.weight", None)
            for key, tensor in module_state.items():
                state[f"{name}.{key}"] = tensor.float() if tensor.is_floating_point() else tensor
    config = copy.deepcopy(job.model.config)
    config.tensor_networks = networks or None
    model = TnlForCausalLM(config).to(job.model.device)
    model.load_state_dict(state)
    return model.eval()


def measure(job: Job, model: TnlForCausalLM, rows: Rows | None, what: str) -> float | None:
    """Bits per byte on the rows."""
    if rows is None:
        return None
    with job.task(what, rows.tokens.numel()) as advance:
        return bits_per_byte(model, rows, max(1, BATCH_TOKENS // rows.tokens.shape[1]), advance)


def expand(settings: ExpandSettings) -> Path:
    """Write a compressed model with dense matrices, which needs nothing of tensor networks to be read.

    Raises:
        ValueError: The model is not a TNL.
        OSError: The model cannot be read or written.
    """
    folder = find_model_folder(settings.model)
    model, tokenizer = load_model(settings.model, choose_device("cpu"), "float32")
    if not isinstance(model, TnlForCausalLM):
        raise ValueError(f"model: expected a TNL, got {type(model).__name__} in {folder}")
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_model(densify(model), tokenizer, output)
    Console(stderr=True).print(f"wrote {output}")
    return output


@torch.no_grad()
def densify(model: TnlForCausalLM) -> TnlForCausalLM:
    """The same model with dense matrices."""
    state: dict[str, Tensor] = {}
    networked = {n: m for n, m in model.named_modules() if isinstance(m, TensorNetworkLinear | TensorNetworkEmbedding)}
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner in networked:
            state[f"{owner}.weight"] = networked[owner].dense()
        else:
            state[name] = tensor
    config = copy.deepcopy(model.config)
    config.tensor_networks = None
    dense = TnlForCausalLM(config).to(device=model.device, dtype=model.dtype)
    dense.load_state_dict(state)
    return dense.eval()
