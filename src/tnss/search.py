"""The search: one loop that asks a method, fits what it proposes, and tells it what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tnss.bound import BoundSearch
from tnss.cache import Cache, problem_name
from tnss.executor import Executor, Local, Problem
from tnss.fit import ALS, FitRequest
from tnss.methods import METHODS, Evaluation, Method, Proposal, View
from tnss.network import Network
from tnss.objective import Lagrangian, Objective, ParameterBudget
from tnss.result import Record, Result
from tnss.space import Domain, Point, Space
from tnss.spectrum import Spectrum
from tnss.structure import Structure

CERTIFICATE_NODES = 100_000  # boxes looked at for the gap of a method that does not use the bound itself


@dataclass(frozen=True)
class Budget:
    """When to stop, whatever comes first.

    Args:
        evaluations: most evaluations (repeats included).
        seconds: most seconds, those of fits taken from the cache included.
    """

    evaluations: int = 500
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"evaluations: expected at least 1, got {self.evaluations}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")


@dataclass(frozen=True)
class Progress:
    """The state of a running search, for a display."""

    best: Network
    gap: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Control:
    """The less usual settings of a search.

    Args:
        start: where to start: a point ``(values, permutation)`` of the space; None for the method's choice.
        bound: compute the spectrum and use the lower bound (for the gap; ``auto`` for its proposals).
        reuse: answer a structure proposed again from memory; False fits it again, as a restart, which is how the
            papers count.
        target: stop once the objective is at or below this.
        progress: called after each batch.
    """

    start: Point | tuple[tuple[int, ...], tuple[int, ...]] | None = None
    bound: bool = True
    reuse: bool = True
    target: float | None = None
    progress: Callable[[Progress], None] | None = None


def search(
    tensor: torch.Tensor | np.ndarray,
    space: Space,
    objective: Objective | None = None,
    method: str | object = "auto",
    fit: ALS | None = None,
    budget: Budget | None = None,
    executor: Executor | None = None,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    weights: torch.Tensor | np.ndarray | None = None,
    control: Control | None = None,
) -> Result:
    """Find the tensor network that stores a tensor best.

    Args:
        tensor: order at least 3, real, finite (where its weight is not 0), not all zero. Computed in float64.
        space: ``Ring``, ``Train``, ``Tree``, ``Complete`` or ``Graph``.
        objective: ``Lagrangian`` (the default, with weight 200), ``ErrorBudget`` or ``ParameterBudget``.
        method: ``"auto"``, ``"tnale"``, ``"tnls"``, ``"tnga"``, ``"greedy"``, or the options of one of them, for
            example ``TnALEOptions(initial_radius=3)``.
        fit: how a structure is fitted.
        budget: when to stop.
        executor: where to fit: ``Local()`` (the default), ``Joblib()`` or ``Ray()``.
        cache: a file that keeps every fit; a run killed at any moment goes on from it with the same history.
        seed: of everything random. The same seed gives the same result, unless seconds end the run.
        weights: same shape as ``tensor``, at least 0; 0 marks a missing entry, whose value is ignored.
        control: the less usual settings.

    Returns:
        The best network, every fit, and how far from optimal the best can still be.

    Raises:
        ValueError: an argument out of its range, or an objective that no structure of the space can meet.
    """
    data, weight = _checked_tensor(tensor, weights)
    options = None if isinstance(method, str) else method
    run = _Run(
        data,
        weight,
        space.bind(tuple(data.shape)),
        objective or Lagrangian(200.0),
        fit or ALS(),
        budget or Budget(),
        executor or Local(),
        None if cache is None else Cache(cache),
        seed,
        control or Control(),
    )
    return run.go(_method_class(method), options)


def _method_class(method: str | object) -> Callable[..., Method]:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        return METHODS[method]
    for candidate in METHODS.values():
        if type(method).__name__ == candidate.__name__ + "Options":
            return candidate
    raise ValueError(f"method: expected a name or the options of a method, got {method!r}")


def _checked_tensor(
    tensor: torch.Tensor | np.ndarray, weights: torch.Tensor | np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tensor and weights in float64 on the CPU, missing entries set to 0."""
    try:
        data, weight = (None if a is None else torch.as_tensor(a).detach().cpu() for a in (tensor, weights))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tensor: expected a tensor or array of real numbers: {error}") from error
    assert data is not None
    if data.ndim < 3 or data.is_complex() or 0 in data.shape:
        raise ValueError(
            f"tensor: expected a real, non-empty tensor of order 3 or more, got {data.dtype} {tuple(data.shape)}"
        )
    data = data.to(torch.float64)
    if weight is not None:
        weight = weight.to(torch.float64)
        if weight.shape != data.shape:
            raise ValueError(f"weights: expected shape {tuple(data.shape)}, got {tuple(weight.shape)}")
        if not bool(torch.isfinite(weight).all()) or float(weight.min()) < 0 or float(weight.max()) == 0:
            raise ValueError("weights: expected finite weights of at least 0, not all 0")
        data = torch.where(weight > 0, data, torch.zeros_like(data))
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise ValueError(f"tensor: expected finite entries, got {bad} that are NaN or infinite")
    if not bool(data.any()):
        raise ValueError("tensor: expected an entry that is not 0, got the zero tensor")

    return data, weight


def _answers(found: Network, request: FitRequest) -> bool:
    """Whether a fit of the cache will do: one that was dropped does where it would be dropped again."""
    return found.converged or (request.target is not None and found.rse > request.target)


@dataclass
class _Run:
    """One search under way."""

    tensor: torch.Tensor
    weights: torch.Tensor | None
    domain: Domain
    objective: Objective
    fit: ALS
    budget: Budget
    executor: Executor
    cache: Cache | None
    seed: int
    control: Control
    networks: dict[str, Network] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    replayed: float = 0.0

    def go(self, make_method: Callable[..., Method], options: object) -> Result:
        """Run to the end of the budget or of the method."""
        self.began = time.perf_counter()
        smallest = int(sum(self.domain.sizes))
        if isinstance(self.objective, ParameterBudget) and self.objective.parameters < smallest:
            raise ValueError(f"objective: expected a budget of at least {smallest} parameters, got {self.objective}")
        self.scale = float(self.tensor.abs().max())
        self.problem = Problem(self.tensor / self.scale, self.fit, self.weights)
        name = "" if self.cache is None else problem_name(self.tensor, self.weights, self.fit, self.seed)
        spectrum = Spectrum(self.problem.tensor, self.weights, self.seed) if self.control.bound else None
        start = None if self.control.start is None else self.domain.check(Point(*self.control.start))
        generator = np.random.default_rng(self.seed)
        method = make_method(View(self.domain, self.objective, spectrum, generator, start), options)
        bounds = getattr(method, "bounds", None)
        if bounds is None and spectrum is not None:
            bounds = BoundSearch(self.domain, spectrum, self.objective)
        self._refuse_impossible(bounds)
        while not self._spent() and (proposals := method.ask()):
            proposals = proposals[: self.budget.evaluations - len(self.history)]
            method.tell(self._evaluate(name, proposals))
            if self.control.progress:
                best, _ = self._best()
                gap = self._gap(bounds)[0] if hasattr(method, "bounds") else math.nan
                self.control.progress(Progress(self._in_scale(best), gap, len(self.history), self._seconds()))
        if bounds is not None and not hasattr(method, "bounds"):
            self._certify(bounds)
        gap, unfitted = self._gap(bounds)
        networks = [self._in_scale(network) for network in self.networks.values()]
        best, _ = self._best()
        if self.cache is not None:
            self.cache.close()
        return Result(self._in_scale(best), gap, unfitted, self.history, networks, self._seconds(), self.objective)

    def _refuse_impossible(self, bounds: BoundSearch | None) -> None:
        if bounds is not None and bounds.impossible():
            raise ValueError(
                f"objective: expected a budget that some structure of the space can meet, got {self.objective}, "
                "which is below the lower bound of every one"
            )

    def _seconds(self) -> float:
        return time.perf_counter() - self.began + self.replayed

    def _spent(self) -> bool:
        if len(self.history) >= self.budget.evaluations or self._seconds() >= self.budget.seconds:
            return True
        return bool(self.history) and self.control.target is not None and self._best()[1] <= self.control.target

    def _value(self, network: Network) -> float:
        return float(self.objective.value(network.parameters, network.rse, network.structure.entries))

    def _merit(self, structure: Structure, rse: float) -> float:
        return self.objective.merit(structure.parameters, rse, structure.entries)

    def _best(self) -> tuple[Network, float]:
        best = min(self.networks.values(), key=lambda n: (self._merit(n.structure, n.rse), n.parameters))
        return best, self._value(best)

    def _in_scale(self, network: Network) -> Network:
        """The network for the tensor as given: it was fitted to the tensor over its largest entry."""
        factor = self.scale ** (1.0 / len(network.cores))
        cores = tuple(core * factor for core in network.cores)
        return dataclasses.replace(network, cores=cores, objective=self._value(network))

    def _evaluate(self, name: str, proposals: Sequence[Proposal]) -> list[Evaluation]:
        """Fit what is new, in tasks; record one row a proposal."""
        structures = [self.domain.decode(proposal.point) for proposal in proposals]
        wanted: dict[int, tuple[Structure, int]] = {}
        times = self._times_seen()
        for i, structure in enumerate(structures):
            repeat = times.get(structure.key, 0)
            if repeat == 0 or not self.control.reuse:
                wanted[i] = structure, repeat
            times[structure.key] = repeat + 1
        requests = [self._request(proposals[i], *wanted[i]) for i in wanted]
        fitted = dict(zip(wanted, self._fit_all(name, requests, [wanted[i][1] for i in wanted]), strict=True))
        evaluations = []
        for i, structure in enumerate(structures):
            network = fitted.get(i)
            if network is not None:
                known = self.networks.get(structure.key)
                if known is None or network.rse < known.rse:
                    self.networks[structure.key] = network
            rse = self.networks[structure.key].rse if network is None else network.rse
            self._record(structure, rse, network)
            evaluations.append(Evaluation(proposals[i].point, structure, rse, self._merit(structure, rse)))
        return evaluations

    def _times_seen(self) -> dict[str, int]:
        times: dict[str, int] = {}
        for record in self.history:
            times[record.structure] = times.get(record.structure, 0) + 1
        return times

    def _request(self, proposal: Proposal, structure: Structure, repeat: int) -> FitRequest:
        digest = hashlib.sha256(f"{self.seed}/{repeat}/{structure.key}".encode()).digest()
        parent = None if proposal.parent is None else self.networks.get(proposal.parent.key)
        return FitRequest(structure, int.from_bytes(digest[:6], "big"), parent, proposal.target)

    def _fit_all(self, name: str, requests: list[FitRequest], repeats: list[int]) -> list[Network]:
        """Fit requests in the executor's tasks; what the cache has is taken from it, the rest stored task by task."""
        repeat_of = {id(request): repeat for request, repeat in zip(requests, repeats, strict=True)}
        results: dict[int, Network] = {}
        tasks = []
        for task in self.executor.split(requests) if requests else []:
            missing = []
            for request in task:
                found = None
                if self.cache is not None:
                    found = self.cache.lookup(name, request.structure, repeat_of[id(request)])
                if found is None or not _answers(found, request):
                    missing.append(request)
                else:
                    results[id(request)] = found
                    self.replayed += found.seconds
            if missing:
                tasks.append(missing)
        for index, networks in self.executor.run(self.problem, tasks) if tasks else []:
            if self.cache is not None:
                pairs = zip(networks, tasks[index], strict=True)
                self.cache.store(name, [(network, repeat_of[id(request)]) for network, request in pairs])
            for request, network in zip(tasks[index], networks, strict=True):
                results[id(request)] = network
        return [results[id(request)] for request in requests]

    def _record(self, structure: Structure, rse: float, network: Network | None) -> None:
        value = float(self.objective.value(structure.parameters, rse, structure.entries))
        done = (
            (0, 0, 0.0, True) if network is None else (network.fits, network.sweeps, network.seconds, network.converged)
        )
        self.history.append(
            Record(len(self.history) + 1, structure.key, structure.parameters, structure.compression, rse, value, *done)
        )

    def _certify(self, bounds: BoundSearch) -> None:
        """Branch and bound below the best objective found, for methods that do not do so themselves."""
        bounds.cutoff = self._best()[1]
        while bounds.nodes < CERTIFICATE_NODES:
            point = bounds.next(CERTIFICATE_NODES - bounds.nodes)
            if point is None:
                break
            if self.domain.decode(point).key not in self.networks:
                break  # a structure that was not fitted and could be better: its bound is the answer

    def _gap(self, bounds: BoundSearch | None) -> tuple[float, float]:
        """The certified gap, and the gap to what has not been fitted."""
        best, value = self._best()
        if not math.isfinite(value):
            return math.inf, math.inf
        if bounds is None:
            trivial = float(self.objective.value(float(sum(self.domain.sizes)), 0.0, best.structure.entries))
            return max(0.0, value - trivial), max(0.0, value - trivial)
        return max(0.0, value - bounds.lower()), max(0.0, value - bounds.unfitted(self._is_fitted))

    def _is_fitted(self, point: Point) -> bool:
        return self.domain.decode(point).key in self.networks
