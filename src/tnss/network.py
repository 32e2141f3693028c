"""A fitted tensor network: structure, cores and error, with exits to torch, quimb, tensorly and files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import opt_einsum
import torch

from tnss.structure import Structure

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, eq=False)
class Network:
    """Cores for a structure and the error they leave.

    Attributes:
        structure: the graph and its ranks.
        cores: one tensor a vertex, axes as ``structure.core_shapes`` says.
        rse: squared relative error ``||X - network||^2 / ||X||^2``, entries weighted where weights were given.
        fits: starts that were optimised.
        sweeps: sweeps over all cores, summed over the starts.
        seconds: its share of the time of the batch it was fitted in.
        converged: False where the fit was dropped early because it could not win; ``rse`` is then only an
            upper bound of what the structure reaches.
        objective: the search's objective for it; NaN outside a search.
        metadata: anything JSON can hold; kept by :meth:`save`.
    """

    structure: Structure
    cores: tuple[torch.Tensor, ...]
    rse: float
    fits: int = 1
    sweeps: int = 0
    seconds: float = 0.0
    converged: bool = True
    objective: float = math.nan
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = tuple(tuple(core.shape) for core in self.cores)
        if shapes != self.structure.core_shapes:
            raise ValueError(f"cores: expected shapes {self.structure.core_shapes}, got {shapes}")

    @cached_property
    def parameters(self) -> int:
        """Number of entries of all cores."""
        return self.structure.parameters

    def einsum(self) -> str:
        """The einsum equation that contracts ``cores`` to the dense tensor."""
        return self.structure.einsum()

    def reconstruct(self) -> torch.Tensor:
        """The dense tensor, shape ``structure.sizes``."""
        return contract_cores(self.structure, self.cores)

    def to_module(self) -> torch.nn.Module:
        """A module with the cores as parameters whose forward gives the dense tensor."""
        return NetworkModule(self)

    def to_quimb(self) -> Any:
        """A ``quimb.tensor.TensorNetwork``: mode ``i`` is index ``k{i}``, edge ``e`` is ``b{e}``."""
        import quimb.tensor

        tensors = []
        for vertex, core in enumerate(self.cores):
            indices = [f"b{position}" for position in self.structure.incident[vertex]]
            if vertex < self.structure.order:
                indices.append(f"k{vertex}")
            tensors.append(quimb.tensor.Tensor(core.numpy(force=True), indices, tags=[f"V{vertex}"]))
        return quimb.tensor.TensorNetwork(tensors)

    def to_tensorly(self) -> tuple[Any, tuple[int, ...]]:
        """A ``TRTensor`` of tensorly and the permutation of its modes.

        Returns:
            ``(ring, permutation)``: position ``i`` of the ring holds mode ``permutation[i]``. A train is a ring
            whose closing rank is 1.

        Raises:
            ValueError: the structure is neither a ring nor a set of chains; tensorly has no general graphs.
        """
        from tensorly.tr_tensor import TRTensor

        order = ring_order(self.structure)
        if order is None:
            raise ValueError(f"to_tensorly: expected a ring or chains, which tensorly knows, got {self.structure}")
        factors = []
        for position, vertex in enumerate(order):
            core = self.cores[vertex]
            around = (order[position - 1], order[(position + 1) % len(order)])
            axes = [_axis_of_edge(self.structure, vertex, other) for other in around]
            present = [axis for axis in axes if axis is not None]
            core = core.permute(*present, core.ndim - 1)
            left = 1 if axes[0] is None else core.shape[0]
            right = 1 if axes[1] is None else core.shape[len(present) - 1]
            factors.append(core.reshape(left, right, -1).transpose(1, 2).numpy(force=True))
        return TRTensor(factors), tuple(order)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cores and the structure to one safetensors file, atomically."""
        from safetensors.torch import save_file

        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        header = {"structure": self.structure.key, "rse": repr(self.rse), "tnss": json.dumps(self.metadata)}
        cores = {f"core.{vertex}": core.detach().cpu().contiguous() for vertex, core in enumerate(self.cores)}
        save_file(cores, temporary, metadata=header)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Network:
        """Read what :meth:`save` wrote; raises ``ValueError`` where the file is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                structure = Structure.from_dict(json.loads(header["structure"]))
                cores = tuple(file.get_tensor(f"core.{vertex}") for vertex in range(structure.vertices))
                return cls(structure, cores, float(header["rse"]), metadata=json.loads(header["tnss"]))
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise ValueError(f"path: expected a network saved by tnss, got {os.fspath(path)!r}: {error}") from error


class NetworkModule(torch.nn.Module):
    """The cores as parameters; ``forward()`` gives the dense tensor."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.structure = network.structure
        self.cores = torch.nn.ParameterList([torch.nn.Parameter(core.clone()) for core in network.cores])

    def forward(self) -> torch.Tensor:
        """The dense tensor, shape ``structure.sizes``."""
        return contract_cores(self.structure, tuple(self.cores))


def contract_cores(structure: Structure, cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract cores to the dense tensor along the path opt_einsum finds."""
    return opt_einsum.contract(structure.einsum(), *cores)


def relative_squared_error(
    tensor: torch.Tensor | numpy.ndarray, network: Network, weights: torch.Tensor | None = None
) -> float:
    """Squared relative error of a network, from its dense reconstruction in float64."""
    expected = torch.as_tensor(tensor).to("cpu", torch.float64)
    residual = (expected - network.reconstruct().to("cpu", torch.float64)).square()
    if weights is None:
        return float(residual.sum() / expected.square().sum())
    return float((weights * residual).sum() / (weights * expected.square()).sum())


def ring_order(structure: Structure) -> list[int] | None:
    """Vertices along the ring, or along the chains end to end; None where the structure is neither.

    Of the rotations and reflections of a ring the one with the largest (ranks, sizes) is taken, so that rings
    with the same ranks in the same cyclic order are laid out alike.
    """
    if structure.vertices != structure.order or structure.max_degree > 2:
        return None
    neighbours: list[list[int]] = [[] for _ in range(structure.order)]
    rank: dict[tuple[int, int], int] = {}
    for u, v, r in structure.edges:
        neighbours[u].append(v)
        neighbours[v].append(u)
        rank[u, v] = rank[v, u] = r
    chains, left = [], set(range(structure.order))
    for start in sorted(left, key=lambda v: (len(neighbours[v]), v)):
        if start not in left:
            continue
        chain = [start]
        left.discard(start)
        while following := [v for v in neighbours[chain[-1]] if v in left]:
            chain.append(following[0])
            left.discard(following[0])
        if len(neighbours[start]) == 2 and len(chain) < structure.order:
            return None  # a ring that leaves vertices out
        chains.append(chain)
    order = [vertex for chain in chains for vertex in chain]

    def layout(candidate: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pairs = zip(candidate, candidate[1:] + candidate[:1], strict=True)
        return tuple(rank.get(pair, 1) for pair in pairs), tuple(structure.sizes[v] for v in candidate)

    turns = [order[i:] + order[:i] for i in range(len(order))]
    return max((turn[::direction] for turn in turns for direction in (1, -1)), key=layout)


def _axis_of_edge(structure: Structure, vertex: int, other: int) -> int | None:
    for axis, position in enumerate(structure.incident[vertex]):
        if other in structure.edges[position][:2]:
            return axis
    return None
