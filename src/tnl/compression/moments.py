"""Second moments of what goes into a matrix and of the gradients at what comes out, in one pass over text.

For `y = W x` with an error `D = W' - W` of the weight, the mean squared error of the output is
`E |D x|^2 = tr(D C D^T)`, `C = E[x x^T]`. To second order the loss changes by half of `E (g . D x)^2` with the
gradient g at y (empirical Fisher information); with `x x^T` and `g g^T` taken as independent (K-FAC, arXiv 1503.05671
section 3) that is `tr(R D C D^T) / 2`, `R = E[g g^T]`. An embedding is the same with one-hot x turned round: its rows
are read, so their frequencies are R and the gradients at the output give C.

Dimensions: m outputs, n inputs, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGEST_MATRIX = 8192  # of a wider side only the mean squares are kept, not the products


@dataclass(frozen=True)
class Moments:
    """Second moments on both sides of a matrix `[m, n]`, means over tokens, float64.

    Attributes:
        rows: `[m, m]`, or its diagonal `[m]`.
        columns: `[n, n]`, or its diagonal `[n]`.
    """

    rows: Tensor
    columns: Tensor


class _Sum:
    """A running sum of `x x^T` or of its diagonal."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.diagonal = width > LARGEST_MATRIX
        shape = (width,) if self.diagonal else (width, width)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the vectors `[.., width]`."""
        flat = x.detach().reshape(-1, x.shape[-1]).double()  # in float32 the sum would not be positive semidefinite
        self.total += flat.square().sum(0) if self.diagonal else flat.T @ flat
        self.tokens += len(flat)

    def mean(self) -> Tensor:
        """The mean on the CPU."""
        return (self.total / max(1, self.tokens)).cpu()


class _RowCounts(_Sum):
    """How often each row of an embedding is read."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(0, device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Count the ids."""
        self.total += torch.bincount(x.flatten(), minlength=len(self.total))
        self.tokens += x.numel()


def gather_moments(
    model: PreTrainedModel, names: Iterable[str], batches: Iterable[Tensor], advance: Callable[[int], object]
) -> dict[str, Moments]:
    """Moments of the named matrices over text.

    Args:
        model: In evaluation mode; its parameters are left as they are.
        names: Names of its linear layers and embeddings.
        batches: Token ids `[B, T]`.
        advance: Called with the number of tokens after each batch.

    Returns:
        The moments of each name. Gradients are those of the loss summed over tokens: of one token's loss each.
    """
    modules: Mapping[str, nn.Module] = {name: model.get_submodule(name) for name in names}
    sums: dict[str, tuple[_Sum, _Sum]] = {}
    handles = []
    for name, module in modules.items():
        assert isinstance(module, nn.Linear | nn.Embedding)
        (m, n), device = module.weight.shape, module.weight.device
        if isinstance(module, nn.Embedding):
            out = _Sum(n, device)
            into: _Sum = _RowCounts(m, device)
            sums[name] = into, out
        else:
            into, out = _Sum(n, device), _Sum(m, device)
            sums[name] = out, into
        handles.append(module.register_forward_pre_hook(lambda _, given, into=into: into.add(given[0])))
        handles.append(module.register_forward_hook(lambda _, __, y, out=out: y.register_hook(out.add) and None))
    try:
        for tokens in batches:
            tokens = tokens.to(model.device)
            targets = tokens.numel() - len(tokens)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            model.zero_grad(set_to_none=True)
            (loss * targets).backward()
            advance(tokens.numel())
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return {name: Moments(rows.mean(), columns.mean()) for name, (rows, columns) in sums.items()}


def combined(embedding: Moments, head: Moments) -> Moments:
    """Moments of a matrix that is embedding and head at once.

    The errors of both add up; the sum of two products of moments is replaced by one product that has the same trace,
    each side the mean of both, weighted by what each costs.
    """
    costs = [_trace(moments.rows) * _trace(moments.columns) for moments in (embedding, head)]
    total = sum(costs) or 1.0
    sides = []
    for first, second in ((embedding.rows, head.rows), (embedding.columns, head.columns)):
        if first.ndim != second.ndim:
            first, second = (_as_matrix(moment) for moment in (first, second))
        parts = (
            moment * (cost / total / (_trace(moment) or 1.0))
            for moment, cost in zip((first, second), costs, strict=True)
        )
        sides.append(sum(parts, torch.zeros_like(first)))
    return Moments(sides[0] * total, sides[1])


def _trace(moment: Tensor) -> float:
    return float((moment if moment.ndim == 1 else moment.diagonal()).sum())


def _as_matrix(moment: Tensor) -> Tensor:
    return torch.diag(moment) if moment.ndim == 1 else moment
