"""Alternating least squares for any graph, batched over structures and starts, with racing.

Several starts a structure are run side by side: random ones under a ridge that is annealed away (which is what
finds exact fits on graphs with many loops), one grown from rank 1, and, where the caller has
the cores of a neighbouring structure, one that starts from those. Starts that cannot catch up with the best of
their structure, and structures that cannot reach the error they must beat, are dropped on the way. The sweeps
themselves are in :mod:`tnss.sweeps`, the second-order finish in :mod:`tnss.polish`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from tnss.network import Network, ring_order
from tnss.polish import polish
from tnss.structure import Structure
from tnss.sweeps import Plan, Template, balance, plan_for
from tnss.warm import warm_cores

BATCH_ENTRIES = {"cpu": 16_000_000, "cuda": 400_000_000}  # tensor entries times networks held at once
STRIDE_LEAST, STRIDE_LIMIT, STRIDE_GROWTH = 0.05, 2.0, 1.1
THREADED_ENTRIES = 1_000_000
STIRRED = 1e-4  # of a core's norm
MOST_LOOKS = 10.0
ANNEALED_TO = 1e-3  # the ridge of random starts falls from 1 to this, then to nothing
GROWTH_SWEEPS = 3  # sweeps at each rank while growing


@dataclass(frozen=True)
class ALS:
    """How a structure is fitted.

    Args:
        restarts: starts a structure (one of them grown from rank 1 when there are two or more).
        sweeps: most sweeps a start.
        progress: a start has converged when ``check_every`` sweeps lower its RSE by less than this fraction.
        check_every: sweeps between two looks at the error.
        tolerance: an RSE counted as exact, at which a structure's starts all stop.
        polish: structures of up to this many parameters are finished by Levenberg-Marquardt; 0 turns it off.
        racing: drop starts and structures that cannot win.
        device: where to compute, for example ``"cpu"`` or ``"cuda"``.
        dtype: ``"float64"`` or ``"float32"`` (the latter cannot go below an RSE of about 1e-6).
    """

    restarts: int = 4
    sweeps: int = 300
    progress: float = 1e-3
    check_every: int = 10
    tolerance: float = 1e-13
    polish: int = 500
    racing: bool = True
    device: str = "cpu"
    dtype: str = "float64"

    def __post_init__(self) -> None:
        for name in ("restarts", "sweeps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("progress", "tolerance", "polish"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.dtype not in ("float64", "float32"):
            raise ValueError(f"dtype: expected 'float64' or 'float32', got {self.dtype!r}")


@dataclass(frozen=True)
class FitRequest:
    """One structure to fit.

    Attributes:
        structure: what to fit.
        seed: of its random starts; results do not depend on the other requests of a batch.
        parent: a fitted neighbour whose cores give one more start.
        target: the RSE it must beat; a fit that cannot is dropped (only while racing).
    """

    structure: Structure
    seed: int = 0
    parent: Network | None = None
    target: float | None = None


@dataclass(frozen=True)
class _Layout:
    """A structure on the positions of a template: ``order[position]`` is the vertex."""

    template: Template
    order: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass
class _Start:
    """One start of one request, on its way."""

    request: int
    grown: bool
    annealed: bool
    cores: list[torch.Tensor]
    rse: float = float("inf")
    sweeps: int = 0
    dropped: bool = False
    history: list[float] = field(default_factory=list)


class Fitter:
    """Fits structures to one tensor.

    Args:
        tensor: any order and mode sizes.
        settings: how.
        weights: same shape, at least 0, 0 where an entry is missing; None for the plain error.
    """

    def __init__(self, tensor: torch.Tensor, settings: ALS, weights: torch.Tensor | None = None) -> None:
        self.settings = settings
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        self.weights = None if weights is None else weights.to(device, dtype)
        self.tensor = tensor.to(device, dtype)
        if self.weights is not None:
            self.tensor = torch.where(self.weights > 0, self.tensor, torch.zeros_like(self.tensor))
        squared = self.tensor.square()
        self.norm = float((squared if self.weights is None else self.weights * squared).sum())

    def fit(self, requests: Sequence[FitRequest]) -> list[Network]:
        """Fit every request; results in the order of the requests."""
        layouts = [_layout(request.structure) for request in requests]
        results: list[Network | None] = [None] * len(requests)
        with torch.inference_mode(), _few_threads(self.tensor.numel()):
            for members in self._batches(layouts):
                fitted = self._fit_batch([requests[i] for i in members], [layouts[i] for i in members])
                for i, network in zip(members, fitted, strict=True):
                    results[i] = network
        return [network for network in results if network is not None]

    def _batches(self, layouts: list[_Layout]) -> list[list[int]]:
        """Group requests of one template whose padding does not cost more than their own work again."""
        limit = BATCH_ENTRIES.get(torch.device(self.settings.device).type, BATCH_ENTRIES["cpu"])
        most = max(1, limit // (self.tensor.numel() * (self.settings.restarts + 1)))
        waste = 1.5 if self.settings.device == "cpu" else 4.0
        batches: list[list[int]] = []
        order = sorted(range(len(layouts)), key=lambda i: (repr(layouts[i].template), layouts[i].ranks, i))
        widest: tuple[int, ...] = ()
        for i in order:
            layout = layouts[i]
            if batches and len(batches[-1]) < most and layouts[batches[-1][0]].template == layout.template:
                padded = tuple(map(max, widest, layout.ranks))
                if all(
                    plan_for(layout.template, padded).parameters
                    <= waste * plan_for(layout.template, layouts[j].ranks).parameters
                    for j in (batches[-1][0], i)
                ):
                    batches[-1].append(i)
                    widest = padded
                    continue
            batches.append([i])
            widest = layout.ranks
        return batches

    def _fit_batch(self, requests: list[FitRequest], layouts: list[_Layout]) -> list[Network]:
        began = time.perf_counter()
        template = layouts[0].template
        ranks = tuple(max(layout.ranks[e] for layout in layouts) for e in range(len(template.edges)))
        plan = plan_for(template, ranks)
        starts = [start for i, request in enumerate(requests) for start in self._starts(i, request, layouts[i])]
        self._run(plan, starts, requests, layouts)
        results = []
        for i, (request, layout) in enumerate(zip(requests, layouts, strict=True)):
            own = [start for start in starts if start.request == i]
            best = min(own, key=lambda start: start.rse)
            converged = not all(start.dropped for start in own)
            cores = _to_structure(best.cores, layout, request.structure)
            rse = best.rse
            if self._worth_polishing(request, rse, converged):
                cores, rse = polish(self.tensor, request.structure, cores, self.weights, self.settings.tolerance)
            sweeps = sum(start.sweeps for start in own)
            results.append(Network(request.structure, cores, rse, len(own), sweeps, converged=converged))
        seconds = (time.perf_counter() - began) / len(results)
        return [replace(network, seconds=seconds) for network in results]

    def _worth_polishing(self, request: FitRequest, rse: float, converged: bool) -> bool:
        parameters = request.structure.parameters
        small = parameters <= self.settings.polish and parameters * request.structure.entries <= 4_000_000
        return small and converged and rse > self.settings.tolerance and self.settings.dtype == "float64"

    def _starts(self, index: int, request: FitRequest, layout: _Layout) -> list[_Start]:
        starts = []
        own = plan_for(layout.template, layout.ranks)
        restarts = self.settings.restarts
        warm = None
        if request.parent is not None:
            generator = torch.Generator().manual_seed(request.seed % 2**63)
            warm = warm_cores(request.parent, request.structure, generator)
        if warm is not None:
            restarts = (restarts + 1) // 2  # the neighbour's cores are worth some cold starts
            starts.append(
                _Start(index, False, False, [core.to(self.tensor.dtype) for core in _to_positions(warm, layout, own)])
            )
        for restart in range(restarts):
            generator = torch.Generator().manual_seed((request.seed * 1_000_003 + restart) % 2**63)
            noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in own.shapes]
            grown = restart == 1
            starts.append(_Start(index, grown, not grown, [core.to(self.tensor.dtype) for core in noise]))
        return starts

    def _run(self, plan: Plan, starts: list[_Start], requests: list[FitRequest], layouts: list[_Layout]) -> None:
        """Sweep all starts until each has converged, is exact, or was dropped; fills them in."""
        limit = BATCH_ENTRIES.get(torch.device(self.settings.device).type, BATCH_ENTRIES["cpu"])
        most = max(1, limit // self.tensor.numel())
        for first in range(0, len(starts), most):
            _Race(self, plan, starts[first : first + most], requests, layouts).run()


class _Race:
    """The starts of one batch, swept together; those that are done leave."""

    def __init__(
        self,
        fitter: Fitter,
        plan: Plan,
        starts: list[_Start],
        requests: list[FitRequest],
        layouts: list[_Layout],
    ) -> None:
        self.fitter, self.plan, self.settings, self.requests = fitter, plan, fitter.settings, requests
        self.active = starts
        device = fitter.tensor.device
        own_ranks = [layouts[start.request].ranks for start in starts]
        self.ranks = torch.tensor(own_ranks, device=device).reshape(len(starts), -1)
        self.grown = torch.tensor([start.grown for start in starts], device=device)
        annealed = torch.tensor([start.annealed for start in starts], device=device)
        # loops make bad minima, so the more edges at a vertex the slower
        self.cooling = 0.8 if max(map(len, plan.template.incident)) <= 2 else 0.9
        self.ridge = annealed.to(fitter.tensor.dtype)
        # the level at which each request's growth ends: its own, whatever else is in the batch
        self.levels = dict.fromkeys((start.request for start in starts), 1)
        self.levels |= {s.request: max(r, default=1) for r, s in zip(own_ranks, starts, strict=True) if s.grown}
        self.growing = max(self.levels.values())
        self.noise = [
            torch.stack([_pad(start.cores[v], shape) for start in starts]).to(device)
            for v, shape in enumerate(plan.shapes)
        ]
        self.cores = [core * self._mask(v, 1) for v, core in enumerate(self.noise)]
        orders = [layouts[start.request].order for start in starts]
        self.data = _arranged(fitter.tensor, orders, plan.template.sizes)
        self.weights = None if fitter.weights is None else _arranged(fitter.weights, orders, plan.template.sizes)
        self.previous = list(self.cores)
        self.last = torch.full((len(starts),), float("inf"), dtype=fitter.tensor.dtype, device=device)
        self.stride = torch.full_like(self.last, 0.3)
        self.best = dict.fromkeys({start.request for start in starts}, float("inf"))

    def _mask(self, position: int, level: int) -> torch.Tensor:
        """1 where all bond indices at a position are below the ranks active at a level of growth."""
        shape = self.plan.shapes[position]
        active = torch.where(self.grown[:, None], self.ranks.clamp_max(level), self.ranks)
        mask = torch.ones((), device=self.ranks.device, dtype=torch.bool)
        for axis, edge in enumerate(self.plan.template.incident[position]):
            index = torch.arange(shape[axis], device=self.ranks.device)
            below = index < active[:, edge, None]
            mask = mask & below.reshape(len(below), *[1] * axis, -1, *[1] * (len(shape) - axis - 1))
        return mask

    def run(self) -> None:
        sweep = 0
        while self.active:
            sweep += 1
            squared = self.plan.sweep(self.data, self.cores, self.weights, self.ridge)
            balance(self.cores)
            self._extrapolate(squared)
            self.ridge = self.ridge * self.cooling
            self.ridge[self.ridge < ANNEALED_TO] = 0.0
            if bool((self.ridge > 0).any()):
                self._stir()
            if self.growing > 1 and sweep % GROWTH_SWEEPS == 0 and sweep // GROWTH_SWEEPS < self.growing:
                self._grow(sweep // GROWTH_SWEEPS)
            if sweep % self.settings.check_every == 0 or sweep >= self.settings.sweeps:
                self._leave(sweep, (squared / self.fitter.norm).tolist())

    def _stir(self) -> None:
        """Add a little of the start's own noise to the starts under a ridge.

        A strong ridge shrinks all but the leading components towards 0. Without this their sizes, and so the minimum
        they later grow into, would be rounding error: another one on every machine and in every batch.
        """
        for v, core in enumerate(self.cores):
            shape = (-1, *[1] * (core.ndim - 1))
            scale = STIRRED * core.flatten(1).norm(dim=1) / self.noise[v].flatten(1).norm(dim=1)
            self.cores[v] = core + (scale * (self.ridge > 0)).reshape(shape) * self.noise[v]

    def _extrapolate(self, squared: torch.Tensor) -> None:
        """Step on along the last change of the cores, further while that helps (a start at a time).

        The next sweep replaces the first core from the others, so a step too far costs one sweep, never a core.
        """
        better = (squared <= self.last) & (self.ridge == 0)
        self.stride = torch.where(
            better, (self.stride * STRIDE_GROWTH).clamp_max(STRIDE_LIMIT), (0.3 * self.stride).clamp_min(STRIDE_LEAST)
        )
        previous, self.previous, self.last = self.previous, list(self.cores), squared
        step = torch.where(better, self.stride, torch.zeros_like(self.stride))
        for v, core in enumerate(self.cores):
            self.cores[v] = core + step.reshape(-1, *[1] * (core.ndim - 1)) * (core - previous[v])

    def _grow(self, level: int) -> None:
        """Open the next slice of every bond of the grown starts with a little noise."""
        for v, core in enumerate(self.cores):
            fresh = self._mask(v, level + 1) & ~self._mask(v, level) & self.grown.reshape(-1, *[1] * (core.ndim - 1))
            entries = self._mask(v, self.growing).expand_as(core).flatten(1).sum(1)  # without the padding
            scale = core.flatten(1).norm(dim=1) / entries.sqrt()
            self.cores[v] = core + 0.3 * scale.reshape(-1, *[1] * (core.ndim - 1)) * self.noise[v] * fresh

    def _leave(self, sweep: int, errors: list[float]) -> None:
        done = []
        for start, rse in zip(self.active, errors, strict=True):
            start.history.append(rse)
            self.best[start.request] = min(self.best[start.request], rse)
        cooled = math.log(ANNEALED_TO) / math.log(self.cooling)
        for slot, start in enumerate(self.active):
            grown = GROWTH_SWEEPS * self.levels[start.request]
            ready = sweep >= max(cooled, grown) + self.settings.check_every
            if self._is_done(start, sweep, ready):
                start.sweeps = sweep
                done.append(slot)
        if done:
            self._take_out(done)

    def _is_done(self, start: _Start, sweep: int, ready: bool) -> bool:
        rse, best = start.history[-1], self.best[start.request]
        if best <= self.settings.tolerance or sweep >= self.settings.sweeps:
            return True
        if ((start.grown or start.annealed) and not ready) or len(start.history) < 2:
            return False
        gain = start.history[-2] - rse
        if abs(gain) <= self.settings.progress * rse:
            return True
        if gain < 0 or not self.settings.racing:
            return False
        hope = rse - gain * _looks_to_come(start.history)
        target = self.requests[start.request].target
        start.dropped = target is not None and ready and hope > target
        return start.dropped or (ready and hope > best)

    def _take_out(self, done: list[int]) -> None:
        index = torch.tensor(done, device=self.data.device)
        cores = [core[index] for core in self.previous]
        weights = None if self.weights is None else self.weights[index]
        exact = self.plan.squared_error(self.data[index], cores, weights) / self.fitter.norm
        cores = [core.to("cpu") for core in cores]  # in one piece, not a core at a time
        for row, (slot, rse) in enumerate(zip(done, exact.tolist(), strict=True)):
            self.active[slot].rse = rse
            self.active[slot].cores = [core[row] for core in cores]
        leaving = set(done)
        kept = [slot for slot in range(len(self.active)) if slot not in leaving]
        self.active = [self.active[slot] for slot in kept]
        keep = torch.tensor(kept, dtype=torch.long, device=self.data.device)
        self.data, self.ranks, self.grown = self.data[keep], self.ranks[keep], self.grown[keep]
        self.weights = None if self.weights is None else self.weights[keep]
        self.cores = [core[keep] for core in self.cores]
        self.noise = [core[keep] for core in self.noise]
        self.previous = [core[keep] for core in self.previous]
        self.last, self.stride, self.ridge = self.last[keep], self.stride[keep], self.ridge[keep]


@contextmanager
def _few_threads(entries: int) -> Iterator[None]:
    """One thread while the matrices are small: waking others costs more than they bring, far more on busy cores."""
    threads = torch.get_num_threads()
    if entries < THREADED_ENTRIES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _looks_to_come(history: list[float]) -> float:
    """How many times its last gain a start may still gain: twice what a geometric decay of the gains gives."""
    if len(history) < 3 or history[-3] <= history[-2]:
        return MOST_LOOKS
    ratio = (history[-2] - history[-1]) / (history[-3] - history[-2])
    return MOST_LOOKS if ratio >= 0.8 else min(MOST_LOOKS, 2.0 * ratio / (1.0 - ratio) + 0.5)


def _layout(structure: Structure) -> _Layout:
    """Place a structure on a template; rings and chains of one length share theirs."""
    order = ring_order(structure)
    if order is not None:
        count = len(order)
        pairs = [(i, i + 1) for i in range(count - 1)] + [(0, count - 1)]
    else:
        order = list(range(structure.vertices))
        pairs = [(u, v) for u, v, _ in structure.edges]
    rank = {(u, v): r for u, v, r in structure.edges}
    sizes = tuple(structure.sizes[v] if v < structure.order else 1 for v in order)
    ranks = tuple(rank.get((min(order[i], order[j]), max(order[i], order[j])), 1) for i, j in pairs)
    return _Layout(Template(sizes, tuple(pairs)), tuple(order), ranks)


def _to_structure(cores: list[torch.Tensor], layout: _Layout, structure: Structure) -> tuple[torch.Tensor, ...]:
    """Cores on positions, padded -> cores on vertices in float64 on the CPU."""
    result: list[torch.Tensor] = [torch.empty(0)] * structure.vertices
    for position, vertex in enumerate(layout.order):
        edges = layout.template.incident[position]
        core = cores[position][tuple(slice(layout.ranks[e]) for e in edges)]
        names = [_named(layout, e) for e in edges]
        wanted = [structure.edges[e][:2] for e in structure.incident[vertex]]
        axes = [names.index(name) for name in wanted]
        dropped = [axis for axis in range(len(edges)) if axis not in axes]
        core = core.permute(*axes, *dropped, core.ndim - 1).reshape(structure.core_shapes[vertex])
        result[vertex] = core.to("cpu", torch.float64).clone()
    return tuple(result)


def _to_positions(cores: Sequence[torch.Tensor], layout: _Layout, plan: Plan) -> list[torch.Tensor]:
    """Cores on vertices -> cores on positions with the shapes of the structure's own plan."""
    structure_edges = sorted(_named(layout, e) for e, rank in enumerate(layout.ranks) if rank > 1)
    result = []
    for position, vertex in enumerate(layout.order):
        names = [_named(layout, e) for e in layout.template.incident[position]]
        have = [name for name in structure_edges if vertex in name]
        core = cores[vertex]
        if core.ndim == len(have):
            core = core[..., None]  # an internal vertex
        axes = [have.index(name) for name in names if name in have]
        result.append(core.permute(*axes, core.ndim - 1).reshape(plan.shapes[position]))
    return result


def _named(layout: _Layout, edge: int) -> tuple[int, int]:
    i, j = layout.template.edges[edge]
    u, v = sorted((layout.order[i], layout.order[j]))
    return u, v


def _arranged(tensor: torch.Tensor, orders: list[tuple[int, ...]], sizes: tuple[int, ...]) -> torch.Tensor:
    """The tensor once a start, its modes in the order of the start's positions: ``[B, sizes...]``."""
    modes = [[v for v in order if v < tensor.ndim] for order in orders]
    if all(order == modes[0] for order in modes):
        view = tensor.permute(modes[0]).reshape(sizes)
        return view.expand(len(orders), *sizes).contiguous()
    arranged = {tuple(order): tensor.permute(order).reshape(sizes) for order in modes}
    return torch.stack([arranged[tuple(order)] for order in modes])


def _pad(core: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if core.shape == shape:
        return core
    padded = torch.zeros(shape, dtype=core.dtype, device=core.device)
    padded[tuple(slice(size) for size in core.shape)] = core
    return padded
