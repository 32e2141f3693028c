"""The settings of `tnl compress` and `tnl expand`: typed, with their defaults, free of heavy imports."""

from dataclasses import dataclass, field
from typing import Literal

from tnl.training.config import require

KINDS = ("embedding", "head", "qkvu", "output", "gate", "up", "down")
METHODS = ("search", "svd", "ring", "train")
Method = Literal["search", "svd", "ring", "train"]
Weighting = Literal["none", "activations", "loss"]


@dataclass
class CompressSettings:
    """Everything `tnl compress` needs.

    Attributes:
        model: Folder of a TNL (or the folder of a run).
        output: Folder to write: `model/`, `report.csv`, `structures.csv`, `report.json`, `report.png`.
        work: Folder of what has been computed (second moments, searches, fits), from which the same command goes on;
            compressions of a model may share one. By default `work/` in `output`.
        budget: Parameters of the chosen matrices after compression over those before.
        data: Calibration text, as `data.train` of `tnl train`; only `weighting: none` does without.
        held_out: Text on which quality is measured before and after; without it, rows of `data` that are not used for
            calibration.
        kinds: Kinds of matrices that are compressed, out of embedding, head, qkvu, output, gate, up, down.
        method: `search` (structures that `tnss` finds, truncated singular value decompositions among them),
            or one fixed choice: `svd`, `ring` (tensor ring), `train` (train of matrices).
        allocation: Where the parameters are spent: `pareto` (by the fronts of all matrices and one multiplier), or
            `uniform` (the same share of each matrix). Fixed rings and trains have `uniform`.
        weighting: The error that counts: `none` (of the weights), `activations` (of the outputs, by the second moments
            of the inputs), `loss` (second moments of inputs and of the gradients of the outputs).
        pinned: Leave out the numbers of cores that carry no information (a unit matrix inside each bond).
        share: One structure for all matrices of a kind, found on one of them; otherwise one search each.
        orders: Orders of the tensors that a matrix is folded into for the search.
        evaluations: Most structures fitted in one search.
        iterations: Iterations of L-BFGS by which networks that are kept are fitted to the end; others get a quarter.
        calibration_tokens: Tokens of `data` from which second moments are gathered.
        sequence_length: Tokens in a row of calibration text.
        damping: Share of the mean second moment that is added to all of them.
        executor: `local`; `joblib`, searches and fits of single matrices in processes of this machine; `ray`, the
            structures of each search on a Ray cluster.
        workers: Processes of `joblib`, tasks of `ray`; 0 takes one a core.
        seed: Seeds fits and the choice of calibration rows.
        device: `auto` takes a GPU where there is one.
    """

    model: str
    output: str = "runs/compressed"
    work: str = ""
    budget: float = 0.5
    data: str | list[str] = field(default_factory=list)
    held_out: str | list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    method: Method = "search"
    allocation: Literal["pareto", "uniform"] = "pareto"
    weighting: Weighting = "loss"
    pinned: bool = True
    share: bool = True
    orders: list[int] = field(default_factory=lambda: [3, 4, 6])
    evaluations: int = 8
    iterations: int = 400
    calibration_tokens: int = 65536
    sequence_length: int = 512
    damping: float = 0.01
    executor: Literal["local", "joblib", "ray"] = "local"
    workers: int = 0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require("output", self.output, self.output != "", "the name of a folder")
        require("budget", self.budget, 0 < self.budget < 1, "above 0 and below 1")
        require("kinds", self.kinds, bool(self.kinds) and set(self.kinds) <= set(KINDS), f"some of {', '.join(KINDS)}")
        given = bool(self.data) or self.weighting == "none"
        require("data", self.data, given, f"calibration text, which weighting: {self.weighting} needs")
        searched = bool(self.orders) and all(3 <= order <= 8 for order in self.orders)
        require("orders", self.orders, searched, "numbers from 3 to 8")
        for name in ("evaluations", "iterations", "calibration_tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("sequence_length", self.sequence_length, self.sequence_length >= 2, "at least 2")
        require("damping", self.damping, 0 < self.damping <= 1, "above 0 and at most 1")
        require("workers", self.workers, self.workers >= 0, "at least 0")


@dataclass
class ExpandSettings:
    """Everything `tnl expand` needs.

    Attributes:
        model: Folder of a compressed TNL.
        output: Folder to write: the same model with dense matrices, as any other program reads it.
    """

    model: str
    output: str

    def __post_init__(self) -> None:
        require("output", self.output, self.output != "", "the name of a folder")
