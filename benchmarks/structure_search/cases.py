"""The cases: each yields rows; the runner adds machine and versions and writes one CSV a case as rows come."""

import concurrent.futures
import csv
import dataclasses
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tnss
from benchmarks.structure_search import FOLDER, plots, problems, rivals

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A benchmark: how many seeds by default, and the rows of one seed."""

    seeds: int
    rows: Callable[[int], Iterator[Row]]


def run_case(name: str, seeds: int | None = None, jobs: int = 1) -> None:
    """Run one case and write its rows, replacing the old file; each seed on one CPU core, ``jobs`` seeds at a time."""
    path = FOLDER / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".csv.partial")
    written: list[str] = []
    with temporary.open("w", newline="") as file:
        for row in _rows(name, range(seeds or CASES[name].seeds), jobs):
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not written:
                writer.writeheader()
                written = list(row)
            assert list(row) == written, f"{name}: rows with different columns"
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
            file.flush()
            print({key: row[key] for key in list(row)[:-4]}, file=sys.stderr, flush=True)
    os.replace(temporary, path)


def _rows(name: str, seeds: range, jobs: int) -> Iterator[Row]:
    if jobs == 1:
        torch.set_num_threads(1)
        for seed in seeds:
            for row in CASES[name].rows(seed):
                yield {"case": name, "seed": seed} | row | machine(name == "gpu")
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(_seed_rows, itertools.repeat(name), seeds):
            yield from rows


def _seed_rows(name: str, seed: int) -> list[Row]:
    return list(_rows(name, range(seed, seed + 1), 1))


def machine(gpu: bool) -> Row:
    """Machine and versions, for each row."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "machine": torch.cuda.get_device_name() if gpu else f"{model}, 1 core",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def searched(
    tensor: torch.Tensor, space: tnss.Ring | tnss.Complete, objective: Any, **settings: Any
) -> tuple[tnss.Result, Row]:
    """Run a search; the columns that every case reports. ``cpu_seconds`` does not count what others use."""
    began, cpu = time.perf_counter(), time.process_time()
    result = tnss.search(tensor, space, objective, **settings)
    return result, {
        "parameters": result.best.parameters,
        "compression": result.best.structure.compression,
        "rse": result.best.rse,
        "objective": result.best.objective,
        "gap": result.gap,
        "unfitted_gap": result.unfitted_gap,
        "optimal": result.optimal,
        "evaluations": len(result.history),
        "unique_structures": result.unique_structures,
        "fits": sum(record.fits for record in result.history),
        "sweeps": sum(record.sweeps for record in result.history),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def evaluations_until(result: tnss.Result, objective: float) -> int | None:
    """Evaluations, repeats included, when an objective was reached; None where it was not."""
    return next((record.evaluation for record in result.history if record.objective <= objective), None)


def fidelity(seed: int) -> Iterator[Row]:
    """TnALE by the book: no bound, no memory of fits, radius 2 then 1, initial phase of two rounds."""
    control = tnss.Control(bound=False, reuse=False, target=0.17285)
    options = tnss.TnALEOptions(initial_radius=2, radius=1, initial_rounds=2)
    result, columns = searched(
        problems.shared("data"),
        tnss.Ring(7),
        tnss.Lagrangian(200.0),
        method=options,
        fit=tnss.ALS(sweeps=150, polish=0),
        budget=tnss.Budget(2000),
        seed=seed,
        control=control,
    )
    yield {"found_at": evaluations_until(result, 0.17285), **columns}


def _random_ring(tensor: torch.Tensor, seed: int) -> tnss.Structure:
    generator = np.random.default_rng(100 + seed)
    order, ranks = generator.permutation(6).tolist(), generator.integers(1, 8, 6).tolist()
    return tnss.Structure(tensor.shape, [(order[i - 1], order[i], ranks[i]) for i in range(6)])


def authors_solver(seed: int) -> Iterator[Row]:
    """The authors' solver (Adam, 2 x 10,000 steps) on random rings of data.npz: half a minute each."""
    tensor = problems.shared("data")
    structure = _random_ring(tensor, seed)
    began, cpu = time.perf_counter(), time.process_time()
    rse, steps = rivals.adam(tensor, structure, seed)
    yield {
        "parameters": structure.parameters,
        "rse": rse,
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def evaluation(seed: int) -> Iterator[Row]:
    """One evaluation of each ring of ``authors_solver``, whose results file must be there.

    The same fit is made ten times. The first also finds the contraction paths, and ``cpu_seconds`` is the least.
    """
    tensor = problems.shared("data")
    structure = _random_ring(tensor, seed)
    with (FOLDER / "authors_solver.csv").open() as file:
        theirs = next(row for row in csv.DictReader(file) if int(row["seed"]) == seed)
    fitter = tnss.Fitter(tensor, tnss.ALS())
    seconds, cpu_seconds = [], []
    for _ in range(10):
        began, cpu = time.perf_counter(), time.process_time()
        network = fitter.fit([tnss.FitRequest(structure, seed)])[0]
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu)
    adam_rse = float(theirs["rse"])
    yield {
        "parameters": structure.parameters,
        "rse": network.rse,
        "sweeps": network.sweeps,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "first_cpu_seconds": cpu_seconds[0],
        "adam_rse": adam_rse,
        "adam_cpu_seconds": float(theirs["cpu_seconds"]),
        "adam_machine": theirs["machine"],
        "rse_ratio": network.rse / adam_rse if adam_rse > 1e-8 else float(network.rse > 1e-8),
    }


def bound(seed: int) -> Iterator[Row]:
    """The spectrum of data.npz, and the bounds of a million rings."""
    tensor = problems.shared("data")
    ranks = np.random.default_rng(seed).integers(1, 8, (1_000_000, 6))
    edges = np.array([(i, (i + 1) % 6) for i in range(6)])
    cpu = time.process_time()
    spectrum = tnss.Spectrum(tensor)
    spectrum_seconds = time.process_time() - cpu
    cpu = time.process_time()
    bounds = spectrum.bound_ranks(edges, ranks)
    yield {
        "structures": len(bounds),
        "largest_bound": float(bounds.max()),
        "spectrum_cpu_seconds": spectrum_seconds,
        "bounds_cpu_seconds": time.process_time() - cpu,
    }


def planted(seed: int) -> Iterator[Row]:
    """The default method on data.npz and the planted rings."""
    tensors = {"data": (problems.shared("data"), 126, 1e-8)}
    tensors |= {name: (case.tensor(), case.parameters, case.bar) for name, case in problems.PLANTED.items()}
    for name, (tensor, parameters, bar) in tensors.items():
        _, columns = searched(tensor, tnss.Ring(7), tnss.Lagrangian(200.0), seed=seed, budget=tnss.Budget(60))
        yield {"tensor": name, "eff": parameters / columns["parameters"], "bar_met": columns["rse"] <= bar, **columns}


def rings(seed: int) -> Iterator[Row]:
    """Random planted rings of orders 6 and 8 with noise 0 to 1e-2."""
    problem = problems.random_ring(seed)
    result, columns = searched(
        problem.tensor(), tnss.Ring(7), tnss.Lagrangian(200.0), seed=seed, budget=tnss.Budget(60)
    )
    yield {
        "order": len(problem.order),
        "noise": problem.noise,
        "planted": problem.parameters,
        "eff": problem.parameters / result.best.parameters,
        "bar_met": result.best.rse <= problem.bar,
        "found_at": evaluations_until(result, result.best.objective),
        **columns,
    }


def plateau(seed: int) -> Iterator[Row]:
    """From an exact fit in a wrong order (f = 0.3128, 228 parameters): with the bound, and with moves alone."""
    tensor = problems.shared("data")
    start = tnss.Point((6, 3, 1, 3, 4, 4), (0, 2, 3, 4, 5, 1))
    for bound in (True, False):
        control = tnss.Control(start=start, bound=bound, target=0.1729)
        budget = tnss.Budget(120)
        result, columns = searched(
            tensor, tnss.Ring(7), tnss.Lagrangian(200.0), seed=seed, control=control, budget=budget
        )
        first = result.history[0].objective
        yield {"bound": bound, "first": first, "found_at": evaluations_until(result, 0.1729), **columns}


def images(seed: int) -> Iterator[Row]:
    """Two grey images of 4^8 as rings, lambda 5, ranks up to 7, 100 unique structures."""
    for name, bar in (("image_a", 0.3365), ("image_b", 0.2041)):
        budget = tnss.Budget(100)
        result, columns = searched(problems.shared(name), tnss.Ring(7), tnss.Lagrangian(5.0), seed=seed, budget=budget)
        yield {"tensor": name, "bar": bar, "bar_at": evaluations_until(result, bar), **columns}


def example(seed: int) -> Iterator[Row]:
    """The worked example of the documentation, with its picture: the best ring of an image in 12 evaluations."""
    tensor = problems.shared("image_a")
    result, columns = searched(tensor, tnss.Ring(7), tnss.Lagrangian(5.0), seed=seed, budget=tnss.Budget(12))
    plots.plot_example(tensor, result.best)
    yield columns


def topology(seed: int) -> Iterator[Row]:
    """Planted graphs of 5 modes of 4, ranks up to 4 on the complete graph, 200 evaluations."""
    yield _topology(seed, 5, 614)


def topology_6(seed: int) -> Iterator[Row]:
    """The same with 6 modes, of fewer than 2,457 parameters, at most 90 seconds each."""
    yield _topology(seed, 6, 2457, 90.0)


def _topology(seed: int, order: int, limit: int, seconds: float = math.inf) -> Row:
    structure, tensor = problems.planted_topology(seed, order, limit=limit)
    budget = tnss.Budget(200, seconds)
    result, columns = searched(tensor, tnss.Complete(4), tnss.Lagrangian(200.0), seed=0, budget=budget)
    exact = [record for record in result.history if record.rse < 1e-8]
    least = min((record.parameters for record in exact), default=0)
    found = next((record.evaluation for record in exact if record.parameters <= structure.parameters), None)
    eff = structure.parameters / least if least else 0.0
    return {"order": order, "planted": structure.parameters, "eff": eff, "found_at": found, **columns}


def noise(seed: int) -> Iterator[Row]:
    """Strong noise: the default method and TnALE with equal evaluations on A6a and A6b."""
    for name in ("A6a", "A6b"):
        for level in (3e-2, 1e-1):
            case = problems.PLANTED[name]
            tensor = problems.Planted(case.size, case.order, case.bonds, case.seed, level, 0.0).tensor()
            for method in ("auto", "tnale"):
                _, columns = searched(
                    tensor,
                    tnss.Ring(7),
                    tnss.Lagrangian(200.0),
                    method=method,
                    seed=seed,
                    budget=tnss.Budget(100),
                )
                yield {"tensor": name, "noise": level, "method": method, **columns}


def methods(seed: int) -> Iterator[Row]:
    """All methods with our fit, and SVDinsTN, on data.npz and A6n: parameters at the planted error."""
    targets = {"data": (problems.shared("data"), 1e-8), "A6n": (problems.PLANTED["A6n"].tensor(), 1.0e-4)}
    for name, (tensor, error) in targets.items():
        for method in ("auto", "tnale", "tnls", "tnga", "greedy"):
            result, columns = searched(
                tensor, tnss.Ring(7), tnss.Lagrangian(200.0), method=method, seed=seed, budget=tnss.Budget(200)
            )
            met = [network.parameters for network in result.networks if network.rse <= error]
            yield {"tensor": name, "method": method, "parameters_at_error": min(met, default=0), **columns}
        yield {"tensor": name, "method": "svdinstn", **_svdinstn(tensor, error, seed)}


def _svdinstn(tensor: torch.Tensor, error: float, seed: int) -> Row:
    """The best structure of five weights, each fitted by our solver."""
    began, cpu = time.perf_counter(), time.process_time()
    networks = []
    for gamma in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        structure = rivals.SVDinsTN(gamma).structure(tensor, seed)
        if structure.compression < 1:
            networks.append(tnss.Fitter(tensor, tnss.ALS()).fit([tnss.FitRequest(structure, seed)])[0])
    value = tnss.Lagrangian(200.0).merit
    best = min(networks, key=lambda n: value(n.parameters, n.rse, tensor.numel()))
    met = [network.parameters for network in networks if network.rse <= error]
    return {
        "parameters_at_error": min(met, default=0),
        "parameters": best.parameters,
        "compression": best.structure.compression,
        "rse": best.rse,
        "objective": value(best.parameters, best.rse, tensor.numel()),
        "gap": float("nan"),
        "unfitted_gap": float("nan"),
        "optimal": False,
        "evaluations": len(networks),
        "unique_structures": len({network.structure for network in networks}),
        "fits": sum(network.fits for network in networks),
        "sweeps": sum(network.sweeps for network in networks),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def large(seed: int) -> Iterator[Row]:
    """Order 10 with modes of 2, and order 6 with modes of 16 (16.8 M entries)."""
    generator = np.random.default_rng(seed)
    ten = problems.Planted(2, tuple(generator.permutation(10).tolist()), (2, 3) * 5, seed, 1e-2, 0.0).tensor()
    order = tuple(generator.permutation(6).tolist())
    wide = problems.Planted(16, order, (3, 4, 2, 3, 4, 3), seed, 1e-2, 0.0).tensor()
    for name, tensor, space, evaluations in (
        ("order 10, modes of 2", ten, tnss.Ring(4), 60),
        ("order 6, modes of 16", wide, tnss.Ring(6), 12),
    ):
        _, columns = searched(tensor, space, tnss.Lagrangian(200.0), seed=seed, budget=tnss.Budget(evaluations, 500.0))
        yield {"tensor": name, "entries": tensor.numel(), **columns}


def gpu(seed: int) -> Iterator[Row]:
    """1,000 rings of image size in one batch on the GPU, against one CPU core on a sample of them."""
    tensor = problems.shared("image_a")
    generator = np.random.default_rng(seed)
    requests = []
    for index in range(1000):
        order, ranks = generator.permutation(8).tolist(), generator.integers(3, 8, 8).tolist()
        structure = tnss.Structure(tensor.shape, [(order[i - 1], order[i], ranks[i]) for i in range(8)])
        requests.append(tnss.FitRequest(structure, index))
    settings = tnss.ALS(restarts=1, sweeps=60, progress=0.0, racing=False, polish=0)
    on_gpu = tnss.Fitter(tensor, dataclasses.replace(settings, device="cuda"))
    on_gpu.fit(requests[:50])
    torch.cuda.synchronize()
    began = time.perf_counter()
    fast = on_gpu.fit(requests)
    torch.cuda.synchronize()
    gpu_seconds = time.perf_counter() - began
    sample = requests[:40]
    on_cpu = tnss.Fitter(tensor, settings)
    on_cpu.fit(sample[:1])
    began = time.perf_counter()
    slow = [on_cpu.fit([request])[0] for request in sample]
    cpu_seconds = (time.perf_counter() - began) / len(sample)
    began = time.perf_counter()
    on_cpu.fit(sample)
    batched_seconds = (time.perf_counter() - began) / len(sample)
    difference = [abs(a.rse - b.rse) / b.rse for a, b in zip(fast, slow, strict=False)]
    yield {
        "structures": len(requests),
        "sweeps": settings.sweeps,
        "gpu_seconds": gpu_seconds,
        "gpu_seconds_each": gpu_seconds / len(requests),
        "cpu_core_seconds_each": cpu_seconds,
        "cpu_core_batched_seconds_each": batched_seconds,
        "speedup": min(cpu_seconds, batched_seconds) * len(requests) / gpu_seconds,
        "largest_relative_rse_difference": max(difference),
        "median_relative_rse_difference": statistics.median(difference),
    }


CASES = {
    "fidelity": Case(10, fidelity),
    "bound": Case(10, bound),
    "authors_solver": Case(40, authors_solver),
    "evaluation": Case(40, evaluation),
    "planted": Case(10, planted),
    "rings": Case(40, rings),
    "plateau": Case(10, plateau),
    "images": Case(10, images),
    "example": Case(1, example),
    "topology": Case(6, topology),
    "topology_6": Case(6, topology_6),
    "noise": Case(20, noise),
    "methods": Case(10, methods),
    "large": Case(1, large),
    "gpu": Case(1, gpu),
}
