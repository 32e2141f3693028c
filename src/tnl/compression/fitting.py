"""Networks of a matrix fitted in the metric that counts, whatever the folding.

The error `|A^T (W - N(G_1, .., G_v)) B|^2 / 2` is smooth in the cores, so a network that was found in a metric that
only approximates it is finished by L-BFGS on all cores together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnl.compression.metric import Metric, Spectrum
from tnl.models.tnl.matrix_network import MatrixNetwork, contract_to_matrix
from tnss import Structure


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


def refine(
    matrix: Tensor, metric: Metric, network: MatrixNetwork, cores: Sequence[Tensor], iterations: int
) -> tuple[list[Tensor], float]:
    """Lower the error of a network from given cores; never worse than these.

    Returns:
        The cores in float64, and the error.
    """
    before = [core.detach().to(torch.float64).contiguous() for core in balance(cores)]
    parameters = [core.clone().requires_grad_() for core in before]
    scale = float(metric.error(matrix)) or 1.0
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = network_error(matrix, metric, network, parameters) / scale
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(closure)
    after = [parameter.detach() for parameter in parameters]
    errors = [float(network_error(matrix, metric, network, candidate)) for candidate in (before, after)]
    return (after, errors[1]) if errors[1] < errors[0] else (before, errors[0])
