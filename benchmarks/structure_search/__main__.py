"""Runner: ``python -m benchmarks.structure_search [CASE ...]``; no case runs all but ``gpu``; ``plot`` draws."""

import argparse
import sys

from benchmarks.structure_search.cases import CASES, run_case
from benchmarks.structure_search.plots import plot_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure_search", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}, plot")
    parser.add_argument("--seeds", type=int, help="seeds (default: those of the case)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each on a core of its own (default: 1)")
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES) - {"plot"})
    if unknown:
        parser.error(f"expected cases among {', '.join(CASES)}, plot; got {', '.join(unknown)}")
    for name in options.cases or [name for name in CASES if name != "gpu"]:
        if name == "plot":
            plot_all()
        else:
            run_case(name, options.seeds, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
