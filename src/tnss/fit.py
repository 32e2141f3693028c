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
from typing import Literal, get_args

import numpy as np
import torch

from tnss.arrays import Array, Arrays, Tape, permuted
from tnss.network import Network, ring_order
from tnss.polish import polish
from tnss.structure import Structure
from tnss.sweeps import LARGE, Plan, Template, plan_for, smallest_ridge
from tnss.warm import warm_cores

BATCH_ENTRIES = {"cpu": 16_000_000, "cuda": 400_000_000}  # of tensors, or partial contractions, held at once
FIRST_STRIDE, STRIDE_LEAST, STRIDE_LIMIT, STRIDE_GROWTH = 0.3, 0.05, 2.0, 1.1
NUMPY_ENTRIES = 100_000  # tensors of up to this many entries are fitted in NumPy on a CPU
TAPED_ENTRIES = 100_000  # tensor entries times starts up to which sweeps are recorded: a tape holds every intermediate
THREADED_ENTRIES = 1_000_000
STIRRED = 1e-4  # of a core's norm
ALIKE = 3e-3  # relative difference of the errors of two starts that are taken for one
SLOW = 0.8  # ratio of two gains in a row above which their decay is not trusted
ANNEALED_TO = 1e-3  # the ridge of random starts falls from 1 to this, then to nothing
GROWTH_SWEEPS = 3  # sweeps at each rank while growing
SETTLING = 60  # sweeps after the ridge is gone before starts of a structure are raced: the order changes until then
BEHIND = 1.3  # times the least error so far, above which a start that has settled is given up


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
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: expected one that PyTorch knows, such as 'cuda', got {self.device!r}") from error


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


Kind = Literal["annealed", "grown", "warm"]


@dataclass
class _Start:
    """One start of one request, on its way."""

    request: int
    kind: Kind
    cores: list[torch.Tensor]
    rse: float = float("inf")
    sweeps: int = 0
    dropped: bool = False
    history: list[float] = field(default_factory=list)

    def is_like_one_of(self, others: list[_Start]) -> bool:
        """Whether another start of the request has had the same errors, and so most likely has the same end."""
        return any(
            other.request == self.request
            and all(abs(a - b) <= ALIKE * b for a, b in zip(self.history[-2:], other.history[-2:], strict=True))
            for other in others
        )


class Fitter:
    """Fits structures to one tensor.

    Args:
        tensor: any order and mode sizes.
        settings: how.
        weights: same shape, at least 0, 0 where an entry is missing; None for the plain error.
    """

    def __init__(self, tensor: torch.Tensor, settings: ALS, weights: torch.Tensor | None = None) -> None:
        self.settings = settings
        device = torch.device(settings.device)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device: expected one that this machine has, got {settings.device!r}: {error}") from error
        small = device.type == "cpu" and tensor.numel() <= NUMPY_ENTRIES
        self.arrays = Arrays(None if small else device, settings.dtype)
        if weights is not None:
            tensor = torch.where(weights > 0, tensor, torch.zeros_like(tensor))
        self.dense = tensor.to("cpu", torch.float64)
        self.dense_weights = None if weights is None else weights.to("cpu", torch.float64)
        self.tensor = self.arrays.array(self.dense)
        self.weights = None if self.dense_weights is None else self.arrays.array(self.dense_weights)
        squared = self.tensor**2
        self.norm = float((squared if self.weights is None else self.weights * squared).sum())

    def fit(self, requests: Sequence[FitRequest]) -> list[Network]:
        """Fit every request; results in the order of the requests."""
        layouts = [_layout(request.structure) for request in requests]
        results: list[Network | None] = [None] * len(requests)
        with torch.inference_mode(), _few_threads(self.dense.numel()):
            for members in self._batches(layouts):
                fitted = self._fit_batch([requests[i] for i in members], [layouts[i] for i in members])
                for i, network in zip(members, fitted, strict=True):
                    results[i] = network
        return [network for network in results if network is not None]

    def _batches(self, layouts: list[_Layout]) -> list[list[int]]:
        """Group requests of one template that fit together and whose padding does not cost more than their own work."""
        limit = BATCH_ENTRIES.get(torch.device(self.settings.device).type, BATCH_ENTRIES["cpu"])
        most = max(1, limit // (self.dense.numel() * (self.settings.restarts + 1)))
        waste = 1.5 if self.settings.device == "cpu" else 4.0
        batches: list[list[int]] = []
        order = sorted(range(len(layouts)), key=lambda i: (repr(layouts[i].template), layouts[i].ranks, i))
        widest: tuple[int, ...] = ()
        for i in order:
            layout = layouts[i]
            if batches and len(batches[-1]) < most and layouts[batches[-1][0]].template == layout.template:
                padded = tuple(map(max, widest, layout.ranks))
                starts = (len(batches[-1]) + 1) * (self.settings.restarts + 1)
                fits = self.dense.numel() <= LARGE or starts * plan_for(layout.template, padded).peak <= limit
                if fits and all(
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
            cores, rse = _cropped(best.cores, layout), best.rse
            if self._worth_polishing(request, rse, converged):
                cores, rse = self._polished(layout, cores)
            sweeps = sum(start.sweeps for start in own)
            placed = _to_structure(cores, layout, request.structure)
            results.append(Network(request.structure, placed, rse, len(own), sweeps, converged=converged))
        seconds = (time.perf_counter() - began) / len(results)
        return [replace(network, seconds=seconds) for network in results]

    def _worth_polishing(self, request: FitRequest, rse: float, converged: bool) -> bool:
        parameters = request.structure.parameters
        small = parameters <= self.settings.polish and parameters * request.structure.entries <= 4_000_000
        return small and converged and rse > self.settings.tolerance and self.settings.dtype == "float64"

    def _polished(self, layout: _Layout, cores: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        plan = plan_for(layout.template, layout.ranks)
        modes = [v for v in layout.order if v < self.dense.ndim]
        data = self.dense.permute(modes).reshape(layout.template.sizes).numpy()
        root = None
        if self.dense_weights is not None:
            root = self.dense_weights.permute(modes).sqrt().reshape(layout.template.sizes).numpy()
        flat = torch.cat([core.flatten() for core in cores]).numpy()[None]
        flat, error = polish(data, plan, flat, root, self.settings.tolerance * self.norm)
        return [torch.from_numpy(core[0]) for core in plan.split(flat)], error / self.norm

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
            starts.append(_Start(index, "warm", _to_positions(warm, layout, own)))
        for restart in range(restarts):
            generator = torch.Generator().manual_seed((request.seed * 1_000_003 + restart) % 2**63)
            noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in own.shapes]
            starts.append(_Start(index, "grown" if restart == 1 else "annealed", noise))
        return starts

    def _run(self, plan: Plan, starts: list[_Start], requests: list[FitRequest], layouts: list[_Layout]) -> None:
        """Sweep all starts until each has converged, is exact, or was dropped; fills them in."""
        limit = BATCH_ENTRIES.get(torch.device(self.settings.device).type, BATCH_ENTRIES["cpu"])
        most = max(1, limit // self.dense.numel())
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
        self.arrays, self.active = fitter.arrays, starts
        own_ranks = [layouts[start.request].ranks for start in starts]
        self.ranks = np.array(own_ranks, dtype=np.int64).reshape(len(starts), -1)
        self.grown = np.array([start.kind == "grown" for start in starts])
        # loops make bad minima, so the more edges at a vertex the slower
        self.cooling = 0.8 if max(map(len, plan.template.incident)) <= 2 else 0.9
        self.ridge = self.arrays.array([float(start.kind == "annealed") for start in starts])
        self.annealing = True
        at = np.array([[v in edge for edge in plan.template.edges] for v in plan.positions], dtype=bool)
        rows = np.where(at, self.ranks[:, None, :], 1).prod(2, dtype=float)  # without the padding, [B, positions]
        self.per_row = self.arrays.array(1.0 / rows)
        self.shares = self.per_row + 0.0
        self._set_shares()
        # the level at which each request's growth ends: its own, whatever else is in the batch
        self.levels = dict.fromkeys((start.request for start in starts), 1)
        self.levels |= {
            s.request: max(r, default=1) for r, s in zip(own_ranks, starts, strict=True) if s.kind == "grown"
        }
        self.growing = max(self.levels.values())
        self.owner = self.arrays.array(plan.owner)
        self.noise = self.arrays.array(_padded([start.cores for start in starts], plan))
        self.flat = self.noise * self._mask(1)
        self.cores = plan.split(self.flat)
        orders = [layouts[start.request].order for start in starts]
        self.data = _arranged(fitter.tensor, orders, plan.template.sizes)
        self.weights = None if fitter.weights is None else _arranged(fitter.weights, orders, plan.template.sizes)
        self.tape: tuple[Tape, Array] | None = None  # the sweep of these arrays, and where it puts the errors
        self.previous = self.flat + 0.0
        self.last = self.arrays.array([math.inf] * len(starts))
        self.stride = self.arrays.array([FIRST_STRIDE] * len(starts))
        self.best: dict[tuple[int, Kind], float] = {}

    def _mask(self, level: int) -> Array:
        """1 where all bond indices of an entry are below the ranks active at a level of growth: [B, parameters]."""
        active = np.where(self.grown[:, None], self.ranks.clip(max=level), self.ranks)
        parts = []
        for shape, edges in zip(self.plan.shapes, self.plan.template.incident, strict=True):
            mask = np.ones((len(active), *shape), dtype=bool)
            for axis, edge in enumerate(edges):
                index = np.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
                mask &= index < active[:, edge].reshape(-1, *[1] * len(shape))
            parts.append(mask.reshape(len(active), -1))
        return self.arrays.array(np.concatenate(parts, axis=1).astype(float))

    def run(self) -> None:
        """Sweep until every start has left."""
        sweep = 0
        while self.active:
            sweep += 1
            squared = self._swept()
            self._balance()
            self._extrapolate(squared)
            if self.annealing:
                self._anneal(sweep)
            if self.growing > 1 and sweep % GROWTH_SWEEPS == 0 and sweep // GROWTH_SWEEPS < self.growing:
                self._grow(sweep // GROWTH_SWEEPS)
            if sweep % self.settings.check_every == 0 or sweep >= self.settings.sweeps:
                self._leave(sweep, (squared / self.fitter.norm).tolist())

    def _swept(self) -> Array:
        """Update every core of every start; the squared errors."""
        if self.tape is not None:
            self.tape[0].replay()
            return self.tape[1] + 0.0
        small = self.arrays.device is None and len(self.active) * self.fitter.dense.numel() <= TAPED_ENTRIES
        tape = Tape() if small and self.weights is None else None
        squared = self.plan.sweep(self.data, self.cores, self.fitter.norm, self.weights, self.shares, tape)
        if tape is None:
            return squared
        self.tape = tape, squared
        return squared + 0.0

    def _set_shares(self) -> None:
        """The ridge of each start relative to the trace of the normal equations at each position, in place."""
        self.shares[...] = self.ridge.clip(smallest_ridge(self.ridge))[:, None] * self.per_row

    def _norms(self, flat: Array) -> Array:
        """Norm of each core, [B, positions]."""
        return self.arrays.np.sqrt((flat * flat) @ self.owner)

    def _balance(self) -> None:
        """Give all cores of a network the same norm, leaving the network unchanged."""
        norms = self._norms(self.flat)
        norms = norms + (norms == 0).any(1)[:, None]  # a network that is zero stays as it is, up to its scale
        logs = self.arrays.np.log(norms)
        self.flat *= self.arrays.np.exp(logs.mean(1)[:, None] - logs) @ self.owner.T

    def _anneal(self, sweep: int) -> None:
        """Lower the ridge, and stir a little of the start's own noise into the starts under it.

        A strong ridge shrinks all but the leading components towards 0. Without this their sizes, and so the minimum
        they later grow into, would be rounding error: another one on every machine and in every batch.
        """
        self.annealing = self.cooling**sweep >= ANNEALED_TO
        self.ridge *= self.cooling if self.annealing else 0.0
        self._set_shares()
        if self.annealing:
            share = STIRRED * self._norms(self.flat) / self._norms(self.noise) * (self.ridge > 0)[:, None]
            self.flat += share @ self.owner.T * self.noise

    def _extrapolate(self, squared: Array) -> None:
        """Step on along the last change of the cores, further while that helps (a start at a time).

        The next sweep replaces the first core from the others, so a step too far costs one sweep, never a core.
        """
        better = (squared <= self.last) & (self.ridge == 0)
        longer = (self.stride * STRIDE_GROWTH).clip(None, STRIDE_LIMIT)
        shorter = (self.stride * FIRST_STRIDE).clip(STRIDE_LEAST)
        self.stride = self.arrays.np.where(better, longer, shorter)
        previous, self.previous, self.last = self.previous, self.flat + 0.0, squared
        self.flat += (self.stride * better)[:, None] * (self.flat - previous)

    def _grow(self, level: int) -> None:
        """Open the next slice of every bond of the grown starts with a little noise."""
        opened = (self._mask(level + 1) - self._mask(level)) * self.arrays.array(self.grown)[:, None]
        entries = self._mask(self.growing) @ self.owner  # without the padding
        scale = self._norms(self.flat) / self.arrays.np.sqrt(entries)
        self.flat += 0.3 * (scale @ self.owner.T) * self.noise * opened

    def _leave(self, sweep: int, errors: list[float]) -> None:
        """Take out the starts that are done, and of those that have come to the same error all but one."""
        for start, rse in zip(self.active, errors, strict=True):
            start.history.append(rse)
            key = start.request, start.kind
            self.best[key] = min(rse, self.best.get(key, math.inf))
        cooled = math.log(ANNEALED_TO) / math.log(self.cooling)
        done: list[int] = []
        kept: list[_Start] = []
        for slot, start in sorted(enumerate(self.active), key=lambda pair: pair[1].history[-1]):
            grown = GROWTH_SWEEPS * self.levels[start.request]
            ready = sweep >= max(cooled, grown) + self.settings.check_every
            settled = sweep >= max(cooled, grown) + SETTLING
            if self._is_done(start, sweep, ready, settled) or (
                ready and self.settings.racing and start.is_like_one_of(kept)
            ):
                start.sweeps = sweep
                done.append(slot)
            elif ready:
                kept.append(start)
        if done:
            self._take_out(sorted(done))

    def _is_done(self, start: _Start, sweep: int, ready: bool, settled: bool) -> bool:
        rse = start.history[-1]
        best = {kind: self.best.get((start.request, kind), math.inf) for kind in get_args(Kind)}
        if min(best.values()) <= self.settings.tolerance or sweep >= self.settings.sweeps:
            return True
        if (start.kind != "warm" and not ready) or len(start.history) < 2:
            return False
        gain = start.history[-2] - rse
        if abs(gain) <= self.settings.progress * rse:
            return True
        if gain < 0 or not self.settings.racing:
            return False
        hope = rse - gain * _looks_to_come(start.history, (self.settings.sweeps - sweep) / self.settings.check_every)
        target = self.requests[start.request].target
        start.dropped = target is not None and ready and hope > target
        if start.dropped or (ready and hope > best["warm"]):
            return True
        # annealed and grown starts end in different minima at different speeds: small leads between them say little
        return settled and (hope > best[start.kind] or rse > BEHIND * min(best.values()))

    def _take_out(self, done: list[int]) -> None:
        data = self.data if len(self.data) == 1 else self.data[done]
        weights = self.weights if self.weights is None or len(self.weights) == 1 else self.weights[done]
        flat = self.previous[done]
        exact = self.plan.squared_error(data, self.plan.split(flat), weights) / self.fitter.norm
        flat = self.arrays.to_torch(flat)  # in one piece, not a core at a time
        for row, (slot, rse) in enumerate(zip(done, exact.tolist(), strict=True)):
            self.active[slot].rse = rse
            self.active[slot].cores = [core[0] for core in self.plan.split(flat[row : row + 1])]
        leaving = set(done)
        keep = [slot for slot in range(len(self.active)) if slot not in leaving]
        self.active = [self.active[slot] for slot in keep]
        self.ranks, self.grown = self.ranks[keep], self.grown[keep]
        if len(self.data) > 1:
            self.data = self.data[keep]
        if self.weights is not None and len(self.weights) > 1:
            self.weights = self.weights[keep]
        self.flat, self.noise, self.previous = self.flat[keep], self.noise[keep], self.previous[keep]
        self.cores = self.plan.split(self.flat)
        self.last, self.stride, self.ridge = self.last[keep], self.stride[keep], self.ridge[keep]
        self.per_row, self.shares = self.per_row[keep], self.shares[keep]
        self.tape = None


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


def _looks_to_come(history: list[float], left: float) -> float:
    """How many times its last gain a start may still gain: twice what a geometric decay of the gains gives."""
    if len(history) < 3 or history[-3] <= history[-2]:
        return left
    ratio = (history[-2] - history[-1]) / (history[-3] - history[-2])
    return left if ratio >= SLOW else min(left, 2.0 * ratio / (1.0 - ratio) + 0.5)


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


def _cropped(cores: list[torch.Tensor], layout: _Layout) -> list[torch.Tensor]:
    """Cores on positions without the padding of their batch."""
    incident = layout.template.incident
    return [core[tuple(slice(layout.ranks[e]) for e in incident[v])] for v, core in enumerate(cores)]


def _to_structure(cores: list[torch.Tensor], layout: _Layout, structure: Structure) -> tuple[torch.Tensor, ...]:
    """Cores on positions -> cores on vertices in float64."""
    result: list[torch.Tensor] = [torch.empty(0)] * structure.vertices
    for position, vertex in enumerate(layout.order):
        core, edges = cores[position], layout.template.incident[position]
        names = [_named(layout, e) for e in edges]
        wanted = [structure.edges[e][:2] for e in structure.incident[vertex]]
        axes = [names.index(name) for name in wanted]
        dropped = [axis for axis in range(len(edges)) if axis not in axes]
        core = core.permute(*axes, *dropped, core.ndim - 1).reshape(structure.core_shapes[vertex])
        result[vertex] = core.to(torch.float64).clone()
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


def _arranged(tensor: Array, orders: list[tuple[int, ...]], sizes: tuple[int, ...]) -> Array:
    """The tensor with its modes in the order of each start's positions: ``[B, sizes...]``; B = 1 if all agree."""
    modes = [tuple(v for v in order if v < tensor.ndim) for order in orders]
    arranged = {order: permuted(tensor, order).reshape(1, *sizes) for order in modes}
    parts = list(arranged.values()) if len(arranged) == 1 else [arranged[order] for order in modes]
    return torch.cat(parts) if isinstance(tensor, torch.Tensor) else np.concatenate(parts)


def _padded(networks: list[list[torch.Tensor]], plan: Plan) -> np.ndarray:
    """Cores of networks, smaller bonds padded with zeros: [B, parameters]."""
    flat = np.zeros((len(networks), plan.parameters))
    for position, target in enumerate(plan.split(flat)):
        for row, cores in zip(target, networks, strict=True):
            row[tuple(slice(size) for size in cores[position].shape)] = cores[position]
    return flat
