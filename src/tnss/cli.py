"""The command line: ``tnss search | show | reconstruct | compare``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tnss.objective import Objective
    from tnss.result import Result
    from tnss.space import Space

METHOD_NAMES = ("auto", "tnale", "tnls", "tnga", "greedy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call one function, and turn what the user can mend into one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError, ImportError) as error:  # ImportError: an extra that is not installed
        print(f"tnss: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tnss: interrupted; with --cache the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tnss", description="Tensor-network structure search (arXiv 2304.12875).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="find the network that stores a tensor best")
    _add_problem(search)
    search.add_argument("--method", choices=METHOD_NAMES, default="auto", help="default: auto")
    search.add_argument("--cache", help="sqlite file of fits; a killed run goes on from it")
    search.add_argument("--output", default="tnss-result", help="folder for the result (default: %(default)s)")
    search.add_argument("--workers", type=int, help="fit on this many processes (default: in this one, batched)")
    search.add_argument("--ray", metavar="ADDRESS", help="fit on a Ray cluster ('local' starts one)")
    search.set_defaults(command=_search)

    show = commands.add_parser("show", help="print a result folder")
    show.add_argument("folder")
    show.set_defaults(command=_show)

    reconstruct = commands.add_parser("reconstruct", help="write the dense tensor of a result folder")
    reconstruct.add_argument("folder")
    reconstruct.add_argument("output", help=".npy, .npz, or .png (a matrix of grey values in 0..1)")
    reconstruct.add_argument("--shape", type=_sizes, help="reshape to these sizes, for example 256,256")
    reconstruct.set_defaults(command=_reconstruct)

    compare = commands.add_parser("compare", help="run several methods on one tensor")
    _add_problem(compare)
    compare.add_argument("--methods", default=",".join(METHOD_NAMES), help="default: %(default)s")
    compare.add_argument("--output", default="tnss-compare", help="folder for table and plot (default: %(default)s)")
    compare.set_defaults(command=_compare)
    return parser


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=".npy, .npz, .png or .safetensors; FILE:NAME picks an array")
    parser.add_argument("--shape", type=_sizes, help="reshape to these mode sizes, for example 4,4,4,4,4,4,4,4")
    space = parser.add_argument_group("space (default: --ring)").add_mutually_exclusive_group()
    for name, text in (
        ("ring", "tensor ring with permutation"),
        ("train", "tensor train with permutation"),
        ("tree", "any tree"),
        ("complete", "any topology"),
    ):
        space.add_argument(f"--{name}", dest="space", action="store_const", const=name, help=text)
    parser.set_defaults(space="ring")
    parser.add_argument("--max-rank", type=int, default=8, help="largest rank (default: %(default)s)")
    parser.add_argument("--max-degree", type=int, help="most edges at a vertex (with --complete)")
    parser.add_argument("--no-permute", action="store_true", help="keep the modes in order (ring, train)")
    objective = parser.add_argument_group("objective (default: --lagrangian 200)").add_mutually_exclusive_group()
    objective.add_argument("--lagrangian", type=float, metavar="WEIGHT", help="parameters/entries + WEIGHT * RSE")
    objective.add_argument("--rse", type=float, help="fewest parameters with at most this squared relative error")
    objective.add_argument("--parameters", type=int, help="least error with at most this many parameters")
    parser.add_argument("--restarts", type=int, default=4, help="starts a structure (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to fit (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=200, help="most evaluations (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="most seconds (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 4,4,4, got {text!r}") from None


def _search(options: argparse.Namespace) -> None:
    """Search with live progress and write the result folder."""
    from rich.console import Console
    from rich.live import Live

    from tnss.executor import Executor, Joblib, Local, Ray

    executor: Executor = Local()
    if options.workers is not None:
        executor = Joblib(options.workers)
    if options.ray is not None:
        executor = Ray(None if options.ray == "local" else options.ray)
    folder = _output_folder(options.output)
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=4) as live:
        result = _run(options, options.method, lambda state: live.update(_progress(state)), options.cache, executor)
    result.save(folder)
    _print(result.summary(), options.output)


def _output_folder(name: str) -> Path:
    """The folder for the result, looked at before a search rather than after it."""
    if os.path.exists(name) and not os.path.isdir(name):
        raise ValueError(f"--output: expected a folder, got the file {name!r}")
    return Path(name)


def _run(
    options: argparse.Namespace, method: str, progress: Any, cache: str | None = None, executor: Any = None
) -> Result:
    from tnss.fit import ALS
    from tnss.search import Budget, Control, search

    tensor = read_tensor(options.file)
    if options.shape:
        tensor = _reshaped(tensor, options.shape)
    return search(
        tensor,
        _space(options),
        _objective(options),
        method,
        ALS(restarts=options.restarts, device=options.device),
        Budget(options.evaluations, options.seconds),
        executor,
        cache,
        options.seed,
        control=Control(progress=progress),
    )


def _progress(state: Any) -> str:
    gap = "not computed yet" if math.isnan(state.gap) else f"{state.gap:.4g}"
    best = state.best
    return (
        f"best {best.objective:.6g} ({best.parameters} parameters, RSE {best.rse:.3g})  "
        f"gap {gap}  evaluations {state.evaluations}  {state.seconds:.0f} s"
    )


def _space(options: argparse.Namespace) -> Space:
    from tnss.space import Complete, Ring, Train, Tree

    if options.max_degree is not None and options.space != "complete":
        raise ValueError("--max-degree: expected together with --complete")
    if options.space == "complete":
        return Complete(options.max_rank, options.max_degree)
    if options.space == "tree":
        return Tree(options.max_rank)
    return (Train if options.space == "train" else Ring)(options.max_rank, not options.no_permute)


def _objective(options: argparse.Namespace) -> Objective:
    from tnss.objective import ErrorBudget, Lagrangian, ParameterBudget

    if options.rse is not None:
        return ErrorBudget(options.rse)
    if options.parameters is not None:
        return ParameterBudget(options.parameters)
    return Lagrangian(200.0 if options.lagrangian is None else options.lagrangian)


def read_tensor(name: str) -> np.ndarray:
    """Read an array from ``FILE`` or ``FILE:NAME``.

    Args:
        name: ``.npy``; ``.npz`` and ``.safetensors`` (``NAME`` may be left out where there is one array, or one
            of order 3 or more); ``.png``, as a matrix of grey values in 0..1.

    Raises:
        ValueError: no such file or array, or a file that cannot be read.
    """
    import numpy as np

    path, _, key = name.partition(":") if not os.path.exists(name) else (name, "", "")
    suffix = Path(path).suffix
    if suffix not in (".npy", ".npz", ".png", ".safetensors"):
        raise ValueError(f"file: expected .npy, .npz, .png or .safetensors, got {name!r}")
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if suffix == ".png":
            return _read_png(path)
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return _pick({k: archive[k] for k in archive.files}, key, name)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = {k: v.double().numpy() for k, v in load_file(path).items() if not key or k == key}
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        return _pick(tensors, key, name)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"file: cannot read {name!r}: {error}") from error


def _pick(arrays: dict[str, np.ndarray], key: str, name: str) -> np.ndarray:
    if key:
        if key not in arrays:
            raise ValueError(f"expected one of the arrays {sorted(arrays)}, got {key!r}")
        return arrays[key]
    candidates = [k for k, array in arrays.items() if array.ndim >= 3] if len(arrays) > 1 else list(arrays)
    if len(candidates) != 1:
        raise ValueError(f"expected {name}:NAME with one of the arrays {sorted(arrays)}")
    return arrays[candidates[0]]


def _read_png(path: str) -> np.ndarray:
    import matplotlib.image
    import numpy as np

    image = np.asarray(matplotlib.image.imread(path), dtype=float)
    if image.ndim == 3:
        colours = image[:, :, : 3 if image.shape[2] >= 3 else 1]
        image = colours.mean(2)
    return image


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) != array.size:
        raise ValueError(f"--shape: expected sizes with the product {array.size}, got {shape}")
    return array.reshape(shape)


def _show(options: argparse.Namespace) -> None:
    path = Path(options.folder) / "result.json"
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: expected a result folder of tnss, got {options.folder!r}: {error}") from error
    _print(summary, options.folder)


def _print(summary: dict[str, Any], folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=folder, show_header=False)
    for key, value in summary.items():
        if key == "structure":
            value = " ".join(f"{u}-{v}:{rank}" for u, v, rank in value["edges"]) or "no edges"
        table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _reconstruct(options: argparse.Namespace) -> None:
    import numpy as np

    from tnss.network import Network

    array = Network.load(Path(options.folder) / "cores.safetensors").reconstruct().numpy()
    if options.shape:
        array = _reshaped(array, options.shape)
    output = Path(options.output)
    if output.suffix == ".npy":
        np.save(output, array)
    elif output.suffix == ".npz":
        np.savez(output, tensor=array)
    elif output.suffix == ".png":
        import matplotlib.image

        if array.ndim != 2:
            raise ValueError(f"--shape: expected two sizes for an image, got an array of shape {array.shape}")
        matplotlib.image.imsave(output, np.clip(array, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0)
    else:
        raise ValueError(f"output: expected .npy, .npz or .png, got {options.output!r}")


def _compare(options: argparse.Namespace) -> None:
    """Run each method on the same tensor with the same seed and budget; table, CSV and plot."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from tnss.plotting import plot_comparison
    from tnss.result import write_csv

    methods = options.methods.split(",")
    unknown = sorted(set(methods) - set(METHOD_NAMES))
    if unknown:
        raise ValueError(f"--methods: expected some of {', '.join(METHOD_NAMES)}, got {', '.join(unknown)}")
    folder = _output_folder(options.output)
    console = Console(stderr=True)
    results = {method: _run(options, method, None) for method in track(methods, "comparing", console=console)}
    columns = ("parameters", "rse", "objective", "gap", "evaluations", "unique_structures", "fits", "sweeps", "seconds")
    table = Table("method", *columns)
    rows = [{"method": method} | {key: result.summary()[key] for key in columns} for method, result in results.items()]
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "compare.csv", rows)
    plot_comparison(results, folder / "compare.png")


if __name__ == "__main__":
    sys.exit(main())
