"""Networks of a matrix fitted in the metric that counts, whatever the folding.

The error `|A^T (W - N(G_1, .., G_v)) B|^2 / 2` is smooth in the cores, so a network that was found in a metric that
only approximates it is finished by L-BFGS on its cores.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import opt_einsum
import torch
from torch import Tensor

from tnl.compression.foldings import through_sides
from tnl.compression.metric import Metric, Side, Spectrum, factor_sides
from tnl.models.tnl.matrix_network import MatrixNetwork, contract_to_matrix
from tnss import Structure

SHRINKAGE = 0.1  # weight of the cores' norms over the error that a fit begins with
RIDGES = (1e-12, 1e-9, 1e-6)  # of the mean diagonal of the normal equations


def two_vertices(shape: tuple[int, int], rank: int) -> MatrixNetwork:
    """The layout of a product of `[m, r]` and `[r, n]`: one vertex for the rows, one for the columns."""
    return MatrixNetwork(shape, shape[:1], shape[1:], ((0,), (1,)), Structure(shape, [(0, 1, rank)]))


def truncated(spectrum: Spectrum, rank: int, metric: Metric) -> tuple[MatrixNetwork, list[Tensor]]:
    """The best network of two vertices with this rank, and its cores."""
    left, right = spectrum.factors(rank, metric)
    network = two_vertices((left.shape[0], right.shape[1]), rank)
    cores = zip((left.T, right), network.structure.core_shapes, strict=True)
    return network, [core.contiguous().reshape(shape) for core, shape in cores]


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same network with cores of equal norm."""
    norms = torch.stack([core.norm() for core in cores])
    if not bool((norms > 0).all()):
        return list(cores)
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def network_error(matrix: Tensor, metric: Metric, network: MatrixNetwork, cores: Sequence[Tensor]) -> Tensor:
    """`|A^T (W - N) B|^2 / 2`, differentiable in the cores."""
    return 0.5 * metric.whiten(matrix - contract_to_matrix(network, cores)).square().sum()


class _Problem:
    """A fit in coordinates that make it well conditioned.

    Each core takes the whitening of the factors that it holds. What that leaves of the whitening of a side, as a
    product of its factors' moments is not the whole moment, stays as a matrix before the network; it is near a
    multiple of the unit matrix, and absent where a vertex holds the whole side.

    The error is quadratic in the core of a vertex that holds a whole side, so that this core is solved for and only
    the others are moved (variable projection, Golub and Pereyra 1973): `T - E G` with E what the other cores give.
    """

    def __init__(self, matrix: Tensor, metric: Metric, network: MatrixNetwork, damping: float) -> None:
        row_sides = factor_sides(metric.rows, network.rows, damping)
        column_sides = factor_sides(metric.columns, network.columns, damping)
        self.sides = row_sides + column_sides
        self.rest = _rest(metric.rows, row_sides), _rest(metric.columns, column_sides)
        self.target = metric.whiten(matrix)
        whole = math.prod(network.rows), math.prod(network.columns)
        self.network = MatrixNetwork(whole, network.rows, network.columns, network.modes, network.structure)
        self.solved = self._vertex_of_a_side()
        if self.solved is not None:
            vertex, side = self.solved
            self.expression = self._environment(vertex, side)

    def _vertex_of_a_side(self) -> tuple[int, int] | None:
        """The largest vertex that holds a side, whole and alone: `(vertex, 0 for rows or 1 for columns)`."""
        found: list[tuple[int, int, int]] = []
        for vertex, mode in enumerate(self.network.modes):
            for side, count in enumerate((len(self.network.rows), len(self.network.columns))):
                if count == 1 and mode == (side * len(self.network.rows),) and self.rest[side] is None:
                    found.append((self.network.structure.sizes[vertex], vertex, side))
        return max(found)[1:] if found else None

    def _environment(self, vertex: int, side: int) -> Callable[..., Tensor]:
        """The contraction of all cores but one: `[factors of the other side, bonds of the vertex]`."""
        indices = self.network.indices()
        names = {name: opt_einsum.get_symbol(n) for n, name in enumerate(dict.fromkeys(itertools.chain(*indices)))}
        terms = ["".join(names[name] for name in own) for own in indices]
        rows, count = len(self.network.rows), len(self.network.rows + self.network.columns)
        kept = range(rows, count) if side == 0 else range(rows)
        output = "".join(names[f"factor {factor}"] for factor in kept) + terms[vertex][:-1]
        others = [place for place in range(len(terms)) if place != vertex]
        shapes = [self.network.factor_shapes()[place] for place in others]
        equation = f"{','.join(terms[place] for place in others)}->{output}"
        return cast(Callable[..., Tensor], opt_einsum.contract_expression(equation, *shapes))

    def start(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The coordinates of cores; balanced."""
        return balance(through_sides(cores, self.network, self.sides, undo=False))

    def finish(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores of coordinates."""
        return through_sides(cores, self.network, self.sides, undo=True)

    def error(self, cores: list[Tensor], shrinkage: float) -> Tensor:
        """The error and `shrinkage` times half of the cores' squared norms, differentiable in the cores.

        Puts the core that is solved for in place.
        """
        error = self._error(cores, shrinkage)
        return error + 0.5 * shrinkage * _squared_norm(cores)

    def _error(self, cores: list[Tensor], shrinkage: float) -> Tensor:
        if self.solved is None:
            rows, columns = self.rest
            result = _times(rows, contract_to_matrix(self.network, cores))
            return 0.5 * (self.target - _times(columns, result.T).T).square().sum()
        vertex, side = self.solved
        target = self.target.T if side == 0 else self.target
        shapes = self.network.factor_shapes()
        given = self.expression(
            *(c.reshape(s) for v, (c, s) in enumerate(zip(cores, shapes, strict=True)) if v != vertex)
        )
        environment = _times(self.rest[1 - side], given.reshape(-1, cores[vertex].numel() // target.shape[1]))
        with torch.no_grad():
            core = _least_squares(environment, target, shrinkage)
        cores[vertex] = core.reshape(cores[vertex].shape)
        return 0.5 * (target - environment @ core).square().sum()


def _squared_norm(cores: Sequence[Tensor]) -> Tensor:
    return torch.stack([core.square().sum() for core in cores]).sum()


def _least_squares(matrix: Tensor, right: Tensor, shrinkage: float) -> Tensor:
    """The `X` with the least `|matrix X - right|^2 + shrinkage |X|^2`, with what else of a ridge the equations need."""
    gram = matrix.T @ matrix
    for ridge in RIDGES:
        shifted = gram + (shrinkage + ridge * float(gram.diagonal().mean())) * torch.eye(len(gram)).to(gram)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            break
    return torch.cholesky_solve(matrix.T @ right, factor)


def _rest(side: Side, parts: Sequence[Side]) -> Tensor | None:
    """What the whitenings of the factors of a side leave of its own: `A^T (A_1 x A_2 x ..)^-T`, `[d, factors]`.

    A diagonal `[d]` where the moments are diagonals (the padding is cut by it); `None` for the unit matrix.
    """
    if len(parts) == 1 and parts[0] is side:
        return None
    product = parts[0].factor
    for part in parts[1:]:
        product = torch.kron(product, part.factor)
    if side.factor.ndim == 1:
        return side.factor / product[: len(side.factor)]
    inverse = torch.linalg.solve_triangular(product.T, torch.eye(len(product)).to(product), upper=True)
    return side.apply(inverse[: len(side.factor)])


def _times(rest: Tensor | None, matrix: Tensor) -> Tensor:
    if rest is None:
        return matrix
    return rest[:, None] * matrix[: len(rest)] if rest.ndim == 1 else rest @ matrix


def refine(
    matrix: Tensor,
    metric: Metric,
    network: MatrixNetwork,
    cores: Sequence[Tensor],
    iterations: int,
    damping: float,
    shrinkage: float = SHRINKAGE,
) -> tuple[list[Tensor], float]:
    """Lower the error of a network from given cores; never worse than these.

    Networks with cycles fit better and better with larger and larger cores that cancel each other, which takes many
    iterations and cannot be rounded. A small weight on the cores' norms keeps a fit from that.

    Args:
        matrix: `[m, n]` float64.
        metric: What an error costs.
        network: Not pinned.
        cores: Where to start.
        iterations: Of L-BFGS, most.
        damping: Of the moments of factors, as in :func:`tnl.compression.metric.factor_sides`.
        shrinkage: Weight of the cores' squared norms over that of the error, both as they are at the start.

    Returns:
        The cores in float64, and the error.
    """
    before = [core.detach().to(torch.float64) for core in cores]
    problem = _Problem(matrix, metric, network, damping)
    current = problem.start(before)
    solved = None if problem.solved is None else problem.solved[0]
    first = float(problem.error(current, 0.0))
    current = balance(current)
    scale = first or 1.0
    weight = 2.0 * shrinkage * first / (float(_squared_norm(current)) or 1.0)
    moved = [core.requires_grad_() for vertex, core in enumerate(current) if vertex != solved]
    optimizer = torch.optim.LBFGS(
        moved, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = problem.error(current, weight) / scale
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(closure)
        problem.error(current, weight)
    after = problem.finish([core.detach() for core in current])
    errors = [float(network_error(matrix, metric, network, candidate)) for candidate in (before, after)]
    return (after, errors[1]) if errors[1] < errors[0] else (before, errors[0])
