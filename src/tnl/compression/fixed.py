"""Fixed choices to compare a search with: a ring or a train of matrices whose ranks are alike."""

import math
from typing import Literal

from tnl.compression.foldings import paired_folding
from tnl.compression.matrices import Matrix, stored
from tnl.models.tnl.matrix_network import MatrixNetwork
from tnss import Structure

VERTICES = 4


def fixed_network(matrix: Matrix, method: Literal["ring", "train"], share: float, pinned: bool) -> MatrixNetwork | None:
    """The largest network of equal ranks within a share of the matrix.

    The matrix is cut into four pairs of a row and a column factor (arXiv 1509.06569 for the train), or as many as its
    sides allow. A bond of a train gets no more than the smaller of the sizes that it separates, which is all it can
    use: what that saves goes to the others.

    Returns:
        The network; `None` where even rank 1 is too large.
    """
    for vertices in range(VERTICES, 1, -1):
        try:
            folding = paired_folding(matrix.shape, vertices)
        except ValueError:
            continue
        bonds = [(vertex, vertex + 1) for vertex in range(vertices - 1)]
        if method == "ring" and vertices > 2:
            bonds.append((0, vertices - 1))
            most = [matrix.weight.numel()] * vertices
        else:
            most = [min(math.prod(folding.sizes[:cut]), math.prod(folding.sizes[cut:])) for cut in range(1, vertices)]
        best = None
        for rank in range(1, max(most) + 1):
            edges = [(u, v, min(rank, limit)) for (u, v), limit in zip(bonds, most, strict=True)]
            network = folding.network(Structure(folding.sizes, edges))
            if stored(network, pinned) > share * matrix.weight.numel():
                break
            best = network
        return best
    return None
