"""The matrices of a TNL that can be compressed, and the ways of storing each: dense, truncated, as a network."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tnl.compression.allocation import Front
from tnl.compression.fitting import truncated
from tnl.compression.metric import Metric, Spectrum
from tnl.compression.pinning import pin, pinned_parameters
from tnl.models import TnlForCausalLM
from tnl.models.tnl.matrix_network import MatrixNetwork

Cuts = tuple[tuple[int, ...], ...]

ALIGNED = 8  # the matrix units of GPUs want rows that are multiples of 16 bytes

KIND_OF_MODULE = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "qkvu_proj": "qkvu",
    "qkv_proj": "qkvu",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Option:
    """One way of storing a matrix.

    Attributes:
        kind: `dense`; `svd`, two vertices of the given rank; `network`, with cores that were fitted.
        parameters: Numbers stored.
        error: In the metric of the matrix.
        rank: Of `svd`.
        network: Of `network`, not pinned.
        cores: Of `network`.
    """

    kind: Literal["dense", "svd", "network"]
    parameters: int
    error: float
    rank: int = 0
    network: MatrixNetwork | None = None
    cores: tuple[Tensor, ...] = ()


@dataclass
class Matrix:
    """A matrix of a model and what is known about it.

    Attributes:
        name: Of the module in the model.
        kind: One of `settings.KINDS`.
        weight: `[m, n]` float64.
        metric: What an error costs.
        row_cuts: Cuts of the row index that mean something (streams, heads).
        column_cuts: The same for columns.
        networks: Networks that were fitted to it.
    """

    name: str
    kind: str
    weight: Tensor
    metric: Metric
    row_cuts: Cuts = ()
    column_cuts: Cuts = ()
    networks: list[Option] = field(default_factory=list)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Singular value decomposition of the whitened matrix."""
        return Spectrum.of(self.weight, self.metric)

    def to(self, device: torch.device) -> "Matrix":
        """The same on a device, without its networks."""
        weight, metric = self.weight.to(device), self.metric.to(device)
        return Matrix(self.name, self.kind, weight, metric, self.row_cuts, self.column_cuts)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def total(self) -> float:
        """The error of a matrix of zeros."""
        return self.metric.error(self.weight)

    def svd_parameters(self, rank: int, pinned: bool) -> int:
        """Numbers that two factors of a rank need."""
        m, n = self.shape
        return rank * (m + n - (rank if pinned and m > rank else 0))

    def rank_within(self, parameters: int, pinned: bool) -> int:
        """The largest rank whose factors need at most so many parameters (0: none)."""
        ranks = range(1, min(self.shape) + 1)
        return max((rank for rank in ranks if self.svd_parameters(rank, pinned) <= parameters), default=0)

    def options(self, pinned: bool) -> list[Option]:
        """Dense, truncated decompositions of all aligned ranks that are smaller, and the networks."""
        errors = self.spectrum.errors().tolist()
        dense = self.weight.numel()
        options = [Option("dense", dense, 0.0)]
        for rank in dict.fromkeys(aligned(rank) for rank in range(1, min(self.shape) + 1)):
            parameters = self.svd_parameters(rank, pinned)
            if parameters < dense:
                options.append(Option("svd", parameters, errors[rank], rank=rank))
        return options + [option for option in self.networks if option.parameters < dense]

    def make(self, option: Option, pinned: bool) -> tuple[MatrixNetwork, dict[str, Tensor]]:
        """The network of an option (not `dense`) and the state of its module."""
        if option.kind == "svd":
            network, cores = truncated(self.spectrum, option.rank, self.metric)
        else:
            assert option.network is not None
            network, cores = option.network, list(option.cores)
        if pinned:
            return pin(network, cores)
        return network, {f"core_{vertex}": core for vertex, core in enumerate(cores)}


def aligned(rank: int) -> int:
    """The rank, rounded down to a multiple of 8 from 64 on."""
    return rank if rank < 8 * ALIGNED else rank // ALIGNED * ALIGNED


def front(options: list[Option]) -> Front:
    """Parameters and errors of options."""
    return Front(np.array([o.parameters for o in options]), np.array([o.error for o in options]))


def stored(network: MatrixNetwork, pinned: bool) -> int:
    """Numbers that a network stores."""
    return pinned_parameters(network) if pinned else network.structure.parameters


def find_matrices(model: TnlForCausalLM) -> dict[str, str]:
    """Names of the matrices that can be compressed, with their kinds; a head tied to the embedding is left out."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = KIND_OF_MODULE.get(name.rpartition(".")[2])
        tied = kind == "head" and model.config.tie_word_embeddings
        if kind is not None and isinstance(module, nn.Linear | nn.Embedding) and not tied:
            found[name] = kind
    return found


def meaningful_cuts(model: TnlForCausalLM, kind: str, shape: tuple[int, int]) -> tuple[Cuts, Cuts]:
    """Cuts of rows and of columns into streams and heads."""
    heads, width = model.config.num_attention_heads, model.config.head_dim
    assert width is not None
    if kind == "qkvu":
        streams = shape[0] // (heads * width)
        cuts = [(streams, heads * width), (streams * heads, width), (streams, heads, width)]
        return tuple(cut for cut in cuts if min(cut) > 1), ()
    return (), ((heads, width),) if kind == "output" and heads > 1 else ()


def dense_state(module: nn.Module) -> Tensor:
    """The weight of a linear layer or an embedding in float64."""
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module.weight.detach().to(torch.float64)
