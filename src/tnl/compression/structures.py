"""Structures for the matrices of a kind: searched on one of them, fitted to all.

On one matrix every folding that could beat truncated singular value decomposition is searched by `tnss` in the metric
that its cores can absorb; the best structures are fitted again in the true metric. If the best of a kind is not
clearly worse than a decomposition of the same size, it is a choice for all matrices of the kind, in many sizes: all
ranks scaled down and up.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import tnss
from tnl.compression.fitting import refine
from tnl.compression.foldings import Folding, WhitenedTensor, propose_foldings
from tnl.compression.matrices import Matrix, Option, aligned, stored
from tnl.compression.settings import CompressSettings
from tnl.models.tnl.matrix_network import MatrixNetwork, contract_to_matrix
from tnss.executor import Executor

SHARES = (0.06, 0.1, 0.15, 0.2, 0.27, 0.35, 0.43, 0.51, 0.6, 0.7, 0.8, 0.9)  # of a matrix: sizes of a structure
COMPLETE_ORDER = 4  # up to this order any graph is searched, above it rings
LARGEST_RANK = 128
# Budgets at which a decomposition has a larger rank are searched at this one, and scaled up.
SEARCHED_RANK = {"cpu": 64, "cuda": 256}
# Of one row of a core, which alternating least squares solves for together.
MOST_UNKNOWNS = {"cpu": 1600, "cuda": 6000}
REFINED = 2  # structures of a search that are fitted in the true metric
WORTH_FITTING = 1.1  # times the error of a decomposition of the same size
START_SHARE = 0.3  # norm of a random network over that of the matrix


@dataclass(frozen=True)
class Finding:
    """What came of one folding of one matrix, errors relative to a matrix of zeros.

    Attributes:
        matrix: Name of the matrix that was searched.
        kind: Its kind.
        folding: How it was folded (`i`: factors of rows, `j`: of columns).
        bound: No structure of this space and size is below this, in the metric of the search.
        svd_in_search_metric: Error of the truncated decomposition of the same size in that metric.
        parameters: Of the best structure, as stored.
        error: Of the best structure in the true metric; NaN where the bound ruled the folding out.
        svd_error: Of the decomposition of the same size in the true metric.
        evaluations: Structures that were fitted.
        structure: The best one, `vertex-vertex:rank`.
    """

    matrix: str
    kind: str
    folding: str
    bound: float
    svd_in_search_metric: float
    parameters: int
    error: float
    svd_error: float
    evaluations: int
    structure: str


@dataclass(frozen=True)
class Fits:
    """Fits of structures to matrices, kept in files so that a run that was stopped goes on.

    Attributes:
        folder: Where the files lie; several runs may write there at once.
        identity: What, besides the name of a matrix and the structure, decides a fit.
        settings: Seeds, device, pinning.
    """

    folder: Path
    identity: str
    settings: CompressSettings

    def fit(
        self, matrix: Matrix, network: MatrixNetwork, start: list[Tensor] | None = None, to_the_end: bool = False
    ) -> Option:
        """The network fitted to the matrix in its metric, from given cores or from those `tnss` finds."""
        random = start is None and unknowns(network) > MOST_UNKNOWNS[matrix.weight.device.type]
        iterations = self.settings.iterations if to_the_end or random else -(-self.settings.iterations // 4)
        key = digest([self.identity, matrix.name, network.to_dict(), start is not None, iterations])
        path = self.folder / f"fit-{key}.safetensors"
        device = matrix.weight.device
        if path.exists():
            with safe_open(path, framework="pt", device=str(device)) as file:
                cores = [file.get_tensor(f"core.{vertex}") for vertex in range(network.structure.vertices)]
                error = float(file.metadata()["error"])
        else:
            if start is None:
                start = random_cores(matrix, network) if random else fitted_cores(matrix, network, self.settings)
            start = [core.to(device) for core in start]
            cores, error = refine(matrix.weight, matrix.metric, network, start, iterations, self.settings.damping)
            tensors = {f"core.{vertex}": core.cpu().contiguous() for vertex, core in enumerate(cores)}
            save_atomically(tensors, path, error=repr(error))
        kept = tuple(core.cpu() for core in cores)
        return Option("network", stored(network, self.settings.pinned), error, network=network, cores=kept)

    def finish(self, matrix: Matrix, option: Option) -> Option:
        """The network that was chosen, fitted to the end; never worse than it was."""
        assert option.network is not None
        finished = self.fit(matrix, option.network, list(option.cores), to_the_end=True)
        return min(option, finished, key=lambda candidate: candidate.error)


def digest(what: object) -> str:
    """A name for a file."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def save_atomically(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write tensors; another process that writes the same file does not disturb."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def als(settings: CompressSettings, device: torch.device) -> tnss.ALS:
    """How structures are fitted in a search: what remains to be gained is left to the fit in the true metric."""
    return tnss.ALS(restarts=1, sweeps=15, polish=0, progress=1e-2, device=device.type)


def unknowns(network: MatrixNetwork) -> int:
    """The most numbers that alternating least squares solves for together: the largest product of bonds at a vertex."""
    edges = network.structure.edges
    return max(math.prod(edges[edge][2] for edge in incident) for incident in network.structure.incident)


def random_cores(matrix: Matrix, network: MatrixNetwork) -> list[Tensor]:
    """Normally distributed cores of a network that is somewhat smaller than the matrix; always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = network.structure.core_shapes
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix.weight.device) for shape in shapes]
    size = contract_to_matrix(network, cores).norm()
    scale = (START_SHARE * matrix.weight.norm() / size) ** (1.0 / len(cores))
    return [core * scale for core in cores]


def fitted_cores(matrix: Matrix, network: MatrixNetwork, settings: CompressSettings) -> list[Tensor]:
    """Cores of a given structure by alternating least squares in the metric that they can absorb."""
    whitened = WhitenedTensor(matrix.weight, matrix.metric, Folding.of(network), settings.damping)
    fitter = tnss.Fitter(whitened.tensor.cpu(), als(settings, matrix.weight.device))
    (fitted,) = fitter.fit([tnss.FitRequest(network.structure, settings.seed)])
    return whitened.undo([core.to(matrix.weight.device) for core in fitted.cores], network)


def foldings_of(matrix: Matrix, settings: CompressSettings) -> list[Folding]:
    """The foldings of a matrix that are searched."""
    return propose_foldings(matrix.shape, settings.orders, matrix.row_cuts, matrix.column_cuts)


def search_structures(
    matrix: Matrix, folding: Folding, fits: Fits, executor: Executor | None = None
) -> tuple[Finding, Option | None]:
    """Search one folding of a matrix for structures within the budget's share of its parameters.

    Args:
        matrix: The matrix.
        folding: How it becomes a tensor.
        fits: Where fits are kept.
        executor: Where structures are fitted in a search; this process by default.

    Returns:
        What was found, and the best option where there is one.
    """
    settings = fits.settings
    budget = int(settings.budget * matrix.weight.numel())
    whitened = WhitenedTensor(matrix.weight, matrix.metric, folding, settings.damping)
    largest = max(1, budget // sum(sorted(folding.sizes)[:2]))  # an edge of this rank leaves nothing for others
    graphs = tnss.Complete if len(folding.sizes) <= COMPLETE_ORDER else tnss.Ring
    space = graphs(min(LARGEST_RANK, largest))
    unpinned = int(budget * _slack(folding, budget))
    bound = math.inf if budget < sum(folding.sizes) else whitened.bound(graphs(largest), unpinned)
    truncated_error = whitened.truncated_error(matrix.rank_within(budget, settings.pinned))
    option, evaluations = None, 0
    if bound < truncated_error:
        option, evaluations = _search(matrix, whitened, space, budget, fits, executor or tnss.Local())
    return _finding(matrix, folding, bound, truncated_error, option, evaluations, settings.pinned), option


def _search(
    matrix: Matrix,
    whitened: WhitenedTensor,
    space: tnss.Ring | tnss.Complete,
    budget: int,
    fits: Fits,
    executor: Executor,
) -> tuple[Option | None, int]:
    """The best option after the best structures of a search were fitted in the true metric.

    Alternating least squares solves for all bonds of a vertex together, at a cost that grows with the sixth power of
    the ranks. Of large matrices a smaller network is searched, and its ranks are scaled up to the budget.
    """
    settings, device = fits.settings, matrix.weight.device
    rank = budget / sum(matrix.shape)
    searched = int(budget * min(1.0, SEARCHED_RANK[device.type] / rank) ** 2)
    result = tnss.search(
        whitened.tensor,
        space,
        tnss.ParameterBudget(max(sum(whitened.folding.sizes), int(searched * _slack(whitened.folding, searched)))),
        fit=als(settings, device),
        budget=tnss.Budget(settings.evaluations),
        executor=executor,
        cache=fits.folder / f"search-{digest([matrix.name, str(whitened.folding)])}.sqlite",
        seed=settings.seed,
    )
    best = None
    allowed = [network for network in result.networks if math.isfinite(network.objective)]
    for found in sorted(allowed, key=lambda network: network.rse)[:REFINED]:
        structure = whitened.folding.network(found.structure)
        network = grown(structure, budget, settings.pinned)
        start: list[Tensor] | None = None
        if network == structure:
            start = whitened.undo([core.to(device) for core in found.cores], network)
        option = fits.fit(matrix, network, start)
        if best is None or option.error < best.error:
            best = option
    return best, len(result.history)


def grown(network: MatrixNetwork, budget: int, pinned: bool) -> MatrixNetwork:
    """The network with all ranks scaled so that it just keeps to the budget, and aligned."""
    low, high = 1 / 64, 64.0
    best = scaled_by(network, low)
    for _ in range(30):
        middle = (low + high) / 2
        candidate = scaled_by(network, middle)
        if stored(candidate, pinned) <= budget:
            best, low = candidate, middle
        else:
            high = middle
    return best


def _slack(folding: Folding, budget: int) -> float:
    """About how many more parameters a network may have before it is pinned: those of a matrix, at most 12 %."""
    m, n = folding.shape
    rank = budget / (m + n)
    return 1.0 + min(0.12, rank / (m + n))


def _finding(
    matrix: Matrix,
    folding: Folding,
    bound: float,
    truncated_error: float,
    option: Option | None,
    evaluations: int,
    pinned: bool,
) -> Finding:
    parameters, error, structure, svd_error = 0, math.nan, "", math.nan
    if option is not None and option.network is not None:
        parameters, error = option.parameters, option.error / matrix.total
        rank = matrix.rank_within(parameters, pinned)
        svd_error = float(matrix.spectrum.errors()[rank]) / matrix.total
        structure = describe_bonds(option.network)
    return Finding(
        matrix.name, matrix.kind, str(folding), bound, truncated_error, parameters, error, svd_error, evaluations,
        structure,
    )  # fmt: skip


def describe_bonds(network: MatrixNetwork) -> str:
    """`vertex-vertex:rank` of all bonds."""
    return " ".join(f"{u}-{v}:{rank}" for u, v, rank in network.structure.edges)


def worth_fitting(found: list[tuple[Finding, Option | None]]) -> tuple[MatrixNetwork, float] | None:
    """The structure of a kind that goes on to all of its matrices, and its error over that of a decomposition."""
    pairs = [(finding.error / finding.svd_error, option) for finding, option in found if option is not None]
    ratio, best = min(pairs, key=lambda pair: pair[0], default=(math.inf, None))
    return (best.network, ratio) if ratio < WORTH_FITTING and best is not None and best.network is not None else None


def family(network: MatrixNetwork, settings: CompressSettings) -> list[MatrixNetwork]:
    """The network in the sizes that an allocation may choose: many, or the one that all matrices have."""
    m, n = network.shape
    shares = SHARES if settings.allocation == "pareto" else (settings.budget,)
    return list(dict.fromkeys(grown(network, int(share * m * n), settings.pinned) for share in shares))


def scaled_by(network: MatrixNetwork, scale: float) -> MatrixNetwork:
    """The network with all ranks multiplied, rounded and aligned; bonds of rank 1 stay away."""
    edges = [(u, v, aligned(max(1, round(rank * scale)))) for u, v, rank in network.structure.edges]
    structure = tnss.Structure(network.structure.sizes, edges)
    return MatrixNetwork(network.shape, network.rows, network.columns, network.modes, structure)
