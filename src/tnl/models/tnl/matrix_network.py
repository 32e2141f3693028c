"""Matrices kept as tensor networks: linear layers and embeddings whose weight is never stored densely.

A matrix `W [m, n]` is cut into factors: its rows are counted by factors `i_1 .. i_k`, its columns by `j_1 .. j_l`
(both padded with zeros where they do not divide). Each vertex of the network holds some of the factors, and the
structure says which vertices are joined and with which ranks. Two vertices, one holding all rows and one all columns,
are the truncated singular value decomposition; pairs `(i_1, j_1), (i_2, j_2), ..` in a chain are the train of matrices
of arXiv 1509.06569.

Along an edge of rank r a matrix and its inverse may be put between the two cores without changing the network, so
`r^2` of its numbers say nothing. A *pinned* core has r of its rows (all axes but that edge) equal to the unit matrix:
those are not stored.

Dimensions: m rows, n columns, T tokens, r rank.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from tnss import Structure

PLANNED_TOKENS = (1, 32, 1024, 32768)  # numbers of tokens for which a contraction path is chosen
MOVED = 128  # multiplications that take as long as moving a number to memory and back (329 on an H200 in bfloat16)
FEW_TOKENS = 64  # up to here a pinned core is not put together: what it multiplies is
TOKENS = "tokens"

Step = tuple[tuple[int, ...], str]  # positions of the operands that are taken, and the einsum that joins them


@dataclass(frozen=True)
class MatrixNetwork:
    """How a matrix is laid out as a tensor network.

    Attributes:
        shape: `(m, n)` of the matrix.
        rows: Factors of the row index; their product is at least m.
        columns: Factors of the column index; their product is at least n.
        modes: For each vertex the factors that it holds, counted through rows and then columns.
        structure: Graph and ranks; the size of mode v is the product of the factors in `modes[v]`.
        pinned: `(vertex, edge)` pairs: the core of that vertex is pinned along that edge of `structure.edges`.

    Raises:
        ValueError: The parts contradict each other.
    """

    shape: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    modes: tuple[tuple[int, ...], ...]
    structure: Structure
    pinned: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        factors = self.rows + self.columns
        held = sorted(factor for mode in self.modes for factor in mode)
        _require("modes", held == list(range(len(factors))), f"each of {len(factors)} factors once", self.modes)
        for name, total, cut in (("rows", self.shape[0], self.rows), ("columns", self.shape[1], self.columns)):
            _require(name, math.prod(cut) >= total >= 1, f"factors with a product of at least {total}", cut)
        sizes = tuple(math.prod(factors[factor] for factor in mode) for mode in self.modes)
        _require("structure", self.structure.sizes == sizes, f"modes of sizes {sizes}", self.structure.sizes)
        for vertex, edge in self.pinned:
            valid = vertex < self.structure.vertices and edge in self.structure.incident[vertex]
            _require("pinned", valid, "pairs of a vertex and one of its edges", self.pinned)
            _require("pinned", self.pinned_rows(vertex)[0] >= 0, "cores larger than what is pinned", self.pinned)
        _require("pinned", len(dict(self.pinned)) == len(self.pinned), "each vertex at most once", self.pinned)

    def pinned_rows(self, vertex: int) -> tuple[int, int]:
        """Rows that the pinned core of a vertex stores, and the rank of the edge along which it is pinned."""
        rank = self.structure.edges[dict(self.pinned)[vertex]][2]
        return math.prod(self.structure.core_shapes[vertex]) // rank - rank, rank

    @functools.cached_property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored cores: `structure.core_shapes`, and `[rows, r]` for pinned ones."""
        pinned = dict(self.pinned)
        shapes = enumerate(self.structure.core_shapes)
        return tuple(self.pinned_rows(vertex) if vertex in pinned else shape for vertex, shape in shapes)

    @property
    def parameters(self) -> int:
        """Numbers that are stored (without the places of the pinned rows)."""
        return sum(math.prod(shape) for shape in self.stored_shapes)

    def fold(self, matrix: Tensor) -> Tensor:
        """The matrix `[m, n]` as the tensor of `structure.sizes`."""
        padding = (0, math.prod(self.columns) - self.shape[1], 0, math.prod(self.rows) - self.shape[0])
        factors = F.pad(matrix, padding).reshape(*self.rows, *self.columns)
        return factors.permute([factor for mode in self.modes for factor in mode]).reshape(self.structure.sizes)

    def unfold(self, tensor: Tensor) -> Tensor:
        """The inverse of `fold`."""
        order = [factor for mode in self.modes for factor in mode]
        factors = self.rows + self.columns
        whole = tensor.reshape([factors[factor] for factor in order])
        whole = whole.permute([order.index(factor) for factor in range(len(factors))])
        return whole.reshape(math.prod(self.rows), math.prod(self.columns))[: self.shape[0], : self.shape[1]]

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {
            "shape": list(self.shape),
            "rows": list(self.rows),
            "columns": list(self.columns),
            "modes": [list(mode) for mode in self.modes],
            "edges": [list(edge) for edge in self.structure.edges],
            "pinned": [list(pair) for pair in self.pinned],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MatrixNetwork":
        """The inverse of `to_dict`.

        Raises:
            ValueError: Something else was given.
        """
        try:
            rows, columns = tuple(data["rows"]), tuple(data["columns"])
            modes = tuple(tuple(mode) for mode in data["modes"])
            sizes = [math.prod((rows + columns)[factor] for factor in mode) for mode in modes]
            structure = Structure(sizes, data["edges"])
            pinned = tuple((int(vertex), int(edge)) for vertex, edge in data["pinned"])
            m, n = data["shape"]
            return cls((int(m), int(n)), rows, columns, modes, structure, pinned)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"tensor network: expected what MatrixNetwork.to_dict gives, got {data}") from error

    def indices(self) -> list[tuple[str, ...]]:
        """Names of the axes of each core, its mode cut into factors: `edge 0`, .., `factor 0`, .."""
        return [
            tuple(f"edge {edge}" for edge in incident) + tuple(f"factor {factor}" for factor in self._held(vertex))
            for vertex, incident in enumerate(self.structure.incident)
        ]

    def factor_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the cores with their modes cut into factors."""
        factors, edges = self.rows + self.columns, self.structure.edges
        return [
            tuple(edges[edge][2] for edge in incident) + tuple(factors[factor] for factor in self._held(vertex))
            for vertex, incident in enumerate(self.structure.incident)
        ]

    def _held(self, vertex: int) -> tuple[int, ...]:
        return self.modes[vertex] if vertex < len(self.modes) else ()


class _NetworkModule(nn.Module):
    """The cores of a matrix as parameters, and their contraction."""

    def __init__(self, network: MatrixNetwork, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.network = network
        # Parameters of the module itself: transformers takes a module of custom code without any for initialised.
        for vertex, shape in enumerate(network.stored_shapes):
            self.register_parameter(f"core_{vertex}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for vertex, _ in network.pinned:
            kept, rank = network.pinned_rows(vertex)
            # Row i of the whole core is row order[i] of the unit matrix followed by what is stored.
            order = torch.arange(kept + rank, dtype=torch.int32, device=device)
            self.register_buffer(f"order_{vertex}", order)

    @property
    def cores(self) -> list[Tensor]:
        """The stored cores (shapes: `network.stored_shapes`)."""
        return [getattr(self, f"core_{vertex}") for vertex in range(self.network.structure.vertices)]

    def reset_parameters(self, std: float) -> None:
        """New cores, normally distributed, such that the entries of the matrix have about this standard deviation."""
        paths = math.prod(edge[2] for edge in self.network.structure.edges)
        scale = (std / math.sqrt(paths)) ** (1.0 / len(self.cores))
        for vertex, core in enumerate(self.cores):
            initialization.normal_(core, mean=0.0, std=scale)
            order = getattr(self, f"order_{vertex}", None)
            if order is not None:
                initialization.copy_(order, torch.arange(len(order), dtype=order.dtype, device=order.device))

    def whole_cores(self) -> Iterator[Tensor]:
        """The cores with what is pinned put in place, modes cut into factors (shapes: `factor_shapes`)."""
        pinned = dict(self.network.pinned)
        shapes, incident = self.network.factor_shapes(), self.network.structure.incident
        for vertex, core in enumerate(self.cores):
            if vertex not in pinned:
                yield core.view(shapes[vertex])
                continue
            axis = incident[vertex].index(pinned[vertex])
            rank = core.shape[1]
            unit = torch.eye(rank, dtype=core.dtype, device=core.device)
            whole = torch.cat([unit, core]).index_select(0, getattr(self, f"order_{vertex}"))
            others = shapes[vertex][:axis] + shapes[vertex][axis + 1 :]
            yield whole.view(*others, rank).movedim(-1, axis)

    def dense(self) -> Tensor:
        """The matrix `[m, n]`."""
        return contract_to_matrix(self.network, list(self.whole_cores()))

    def extra_repr(self) -> str:
        """Shape, graph and size, for `print(model)`."""
        m, n = self.network.shape
        return f"in_features={n}, out_features={m}, network={self.network.structure}"


class TensorNetworkLinear(_NetworkModule):
    """`y = x W^T` with `W` a tensor network: `nn.Linear` without a bias, in fewer parameters.

    Args:
        network: Layout of the weight `[out_features, in_features]`.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.
    """

    def __init__(self, network: MatrixNetwork, device: Any = None, dtype: Any = None) -> None:
        super().__init__(network, device, dtype)
        self.out_features, self.in_features = network.shape
        self._plans = [_linear_steps(network, tokens) for tokens in PLANNED_TOKENS]
        plain = network.modes == ((0,), (1,)) and network.rows + network.columns == network.shape
        self._is_pinned_product = plain and network.pinned == ((0, 0),)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `[..., in_features]`; the contraction path is the cheapest one for the number of tokens."""
        network = self.network
        flat = x.reshape(-1, self.in_features)
        if self._is_pinned_product and flat.shape[0] <= FEW_TOKENS:
            stored, right = self.cores
            first = F.linear(flat, right)
            output = torch.cat([first, F.linear(first, stored)], -1).index_select(-1, self.get_buffer("order_0"))
            return output.reshape(*x.shape[:-1], self.out_features)
        padding = math.prod(network.columns) - self.in_features
        if padding:
            flat = F.pad(flat, (0, padding))
        operands = [flat.reshape(-1, *network.columns), *self.whole_cores()]
        output = _contract(_plan_for(self._plans, flat.shape[0]), operands)
        output = output.reshape(flat.shape[0], -1)[:, : self.out_features]
        return output.reshape(*x.shape[:-1], self.out_features)


class TensorNetworkEmbedding(_NetworkModule):
    """Rows of a matrix that is a tensor network: `nn.Embedding` in fewer parameters.

    There is no padding index: all rows share the cores, so none can be held at zero by itself.

    Args:
        network: Layout of the table `[num_embeddings, embedding_dim]`.
        device: As for `nn.Embedding`.
        dtype: As for `nn.Embedding`.
    """

    def __init__(self, network: MatrixNetwork, device: Any = None, dtype: Any = None) -> None:
        super().__init__(network, device, dtype)
        self.num_embeddings, self.embedding_dim = network.shape
        self._plans = [_embedding_steps(network, tokens) for tokens in PLANNED_TOKENS]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `[...]` integer ids; the result is `[..., embedding_dim]`.

        The slices of the cores that the ids pick are contracted token by token; where there are at least as many
        tokens as rows, the whole table once.
        """
        if ids.numel() >= self.num_embeddings:
            return F.embedding(ids, self.dense())
        tokens, operands = ids.reshape(-1), []
        rows = self.network.rows
        for vertex, core in enumerate(self.whole_cores()):
            held = self.network._held(vertex)
            picked = [factor for factor in held if factor < len(rows)]
            if picked:
                bonds = core.ndim - len(held)
                axes = [bonds + held.index(factor) for factor in picked]
                table = core.movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1)
                place = torch.zeros_like(tokens)
                for factor in picked:
                    place = place * rows[factor] + tokens // math.prod(rows[factor + 1 :]) % rows[factor]
                core = table[place]
            operands.append(core)
        output = _contract(_plan_for(self._plans, tokens.shape[0]), operands)
        return output.reshape(tokens.shape[0], -1)[:, : self.embedding_dim].reshape(*ids.shape, self.embedding_dim)


def contract_to_matrix(network: MatrixNetwork, cores: Sequence[Tensor]) -> Tensor:
    """The matrix `[m, n]` of cores without pinning, of the shapes of the structure or with modes cut into factors."""
    whole = [core.reshape(shape) for core, shape in zip(cores, network.factor_shapes(), strict=True)]
    matrix = _contract(_matrix_steps(network), whole).reshape(math.prod(network.rows), math.prod(network.columns))
    return matrix[: network.shape[0], : network.shape[1]]


def replace_matrices(module: nn.Module, networks: Mapping[str, Mapping[str, Any]], prefix: str) -> None:
    """Put tensor networks in place of the matrices of a module.

    Args:
        module: Changed in place.
        networks: For the name of each matrix in the whole model, what `MatrixNetwork.to_dict` gave; names that do
            not begin with the prefix are left alone.
        prefix: Name of `module` in the whole model, with a dot.

    Raises:
        ValueError: A name that is no matrix of the module, or a network of another shape.
    """
    for name, description in networks.items():
        if not name.startswith(prefix):
            continue
        network = MatrixNetwork.from_dict(description)
        path = name.removeprefix(prefix)
        try:
            old = module.get_submodule(path)
        except AttributeError:
            old = None
        if not isinstance(old, nn.Linear | nn.Embedding) or getattr(old, "bias", None) is not None:
            raise ValueError(f"tensor_networks: expected names of matrices of the model, got {name!r}")
        shape = tuple(old.weight.shape)
        _require(f"tensor_networks[{name!r}]", network.shape == shape, f"a network of shape {shape}", network.shape)
        kind = TensorNetworkEmbedding if isinstance(old, nn.Embedding) else TensorNetworkLinear
        module.set_submodule(path, kind(network, device=old.weight.device, dtype=old.weight.dtype))


def _symbols(network: MatrixNetwork) -> dict[str, str]:
    """A letter for each edge and factor, and for the tokens."""
    names = [f"edge {edge}" for edge in range(len(network.structure.edges))]
    names += [f"factor {factor}" for factor in range(len(network.rows + network.columns))]
    return {name: opt_einsum.get_symbol(number) for number, name in enumerate([*names, TOKENS])}


@functools.cache
def _matrix_steps(network: MatrixNetwork) -> tuple[Step, ...]:
    names = _symbols(network)
    output = "".join(names[f"factor {factor}"] for factor in range(len(network.rows + network.columns)))
    terms = ("".join(names[index] for index in indices) for indices in network.indices())
    return _steps(f"{','.join(terms)}->{output}", tuple(network.factor_shapes()))


@functools.cache
def _linear_steps(network: MatrixNetwork, tokens: int) -> tuple[Step, ...]:
    names, rows = _symbols(network), len(network.rows)
    columns = "".join(names[f"factor {rows + factor}"] for factor in range(len(network.columns)))
    output = names[TOKENS] + "".join(names[f"factor {factor}"] for factor in range(rows))
    terms = [names[TOKENS] + columns]
    terms += ["".join(names[index] for index in indices) for indices in network.indices()]
    shapes = [(tokens, *network.columns), *network.factor_shapes()]
    return _steps(f"{','.join(terms)}->{output}", tuple(shapes))


@functools.cache
def _embedding_steps(network: MatrixNetwork, tokens: int) -> tuple[Step, ...]:
    names, rows = _symbols(network), len(network.rows)
    row_names = {f"factor {factor}" for factor in range(rows)}
    terms, shapes = [], []
    for indices, shape in zip(network.indices(), network.factor_shapes(), strict=True):
        kept = [place for place, index in enumerate(indices) if index not in row_names]
        picked = len(kept) < len(indices)
        terms.append(names[TOKENS] * picked + "".join(names[indices[place]] for place in kept))
        shapes.append((tokens,) * picked + tuple(shape[place] for place in kept))
    columns = "".join(names[f"factor {rows + factor}"] for factor in range(len(network.columns)))
    return _steps(f"{','.join(terms)}->{names[TOKENS]}{columns}", tuple(shapes))


@functools.cache
def _steps(equation: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[Step, ...]:
    """The cheapest order of joining two operands at a time, by multiplications and numbers moved."""
    optimize = opt_einsum.DynamicProgramming(minimize=f"combo-{MOVED}")
    _, report = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)
    return tuple((tuple(step[0]), step[2]) for step in report.contraction_list)


def _plan_for(plans: Sequence[tuple[Step, ...]], tokens: int) -> tuple[Step, ...]:
    """The plan made for the largest number of tokens that is not above this one."""
    plan = plans[0]
    for planned, candidate in zip(PLANNED_TOKENS, plans, strict=True):
        if tokens >= planned:
            plan = candidate
    return plan


def _contract(steps: Sequence[Step], operands: Sequence[Tensor]) -> Tensor:
    stack = list(operands)
    for places, equation in steps:
        stack.append(torch.einsum(equation, *[stack.pop(place) for place in places]))
    return stack[0]


def _require(name: str, holds: bool, expected: str, given: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
