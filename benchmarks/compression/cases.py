"""What is compared: methods and sizes, each a case with a name; and the two scales, for a GPU and for a CPU."""

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]

SEARCH = "TnALE search"
METHODS: dict[str, Settings] = {  # in the order in which they are wanted
    SEARCH: {"method": "search"},
    "tensor ring": {"method": "ring", "pinned": False},
    "tensor train": {"method": "train", "pinned": False},
    "SVD, same tools": {"method": "svd"},
    "SVD, activations": {"method": "svd", "weighting": "activations", "allocation": "uniform", "pinned": False},
    "SVD": {"method": "svd", "weighting": "none", "allocation": "uniform", "pinned": False},
}
# What each part of the first method brings: the same with that part changed.
ABLATIONS: dict[str, Settings] = {
    "search, orders 3 and 4": {"method": "search", "orders": [3, 4]},
    "search, uniform": {"method": "search", "allocation": "uniform"},
    "search, unpinned": {"method": "search", "pinned": False},
    "search, activations": {"method": "search", "weighting": "activations"},
    "search, plain weights": {"method": "search", "weighting": "none"},
    "search, one each": {"method": "search", "share": False},
}
ORIGINAL = "original"
BUDGETS = (0.5, 0.25, 0.75)


@dataclass(frozen=True)
class Case:
    """One row before healing and, but for ablations, one after.

    Attributes:
        method: Of METHODS or ABLATIONS, or ORIGINAL.
        budget: Share of the parameters of the compressed matrices.
    """

    method: str
    budget: float

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.method} {self.budget:g}".replace(",", "").replace(" ", "-")

    @property
    def settings(self) -> Settings:
        """Fields of `CompressSettings`."""
        return (METHODS | ABLATIONS)[self.method] | {"budget": self.budget}

    @property
    def healed(self) -> bool:
        """Whether it is healed."""
        return self.method not in ABLATIONS


CASES = [
    Case(ORIGINAL, 1.0),
    *(Case(method, budget) for budget in BUDGETS for method in METHODS),
    *(Case(method, BUDGETS[0]) for method in ABLATIONS),
]


@dataclass(frozen=True)
class Scale:
    """A model, its training, and the effort of compression.

    Attributes:
        model: Fields of the configuration that differ from the preset `tiny`.
        sequence_length: Tokens of a row.
        batch_size: Rows of a step.
        steps: Steps of training; healing takes 5 % of them.
        learning_rate: Of training.
        precision: Of training.
        healing_rates: Learning rates of healing over that of training; the better run counts.
        measured_rows: Rows of held-out text of `sequence_length` tokens.
        compression: Fields of `CompressSettings`.
    """

    model: Settings
    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float
    precision: str
    healing_rates: tuple[float, ...]
    measured_rows: int
    compression: Settings = field(default_factory=dict)


GPU = Scale(
    model={
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 1408,
        "initializer_range": 0.03,
        "tie_word_embeddings": False,
    },
    sequence_length=2048,
    batch_size=32,
    steps=1500,
    learning_rate=2e-3,
    precision="bfloat16",
    healing_rates=(0.1, 0.3),
    measured_rows=256,
    compression={
        "calibration_tokens": 1 << 17,
        "sequence_length": 1024,
        "orders": [3],
        "evaluations": 8,
        "iterations": 160,
        "executor": "joblib",
        "workers": 4,
    },
)
CPU = Scale(
    model={"tie_word_embeddings": False},
    sequence_length=512,
    batch_size=8,
    steps=1500,
    learning_rate=4e-3,
    precision="float32",
    healing_rates=(0.03, 0.1),
    measured_rows=64,
    compression={
        "calibration_tokens": 1 << 15,
        "sequence_length": 512,
        "orders": [3],
        "evaluations": 6,
        "iterations": 160,
    },
)
TINY = Scale(
    model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    sequence_length=64,
    batch_size=2,
    steps=40,
    learning_rate=4e-3,
    precision="float32",
    healing_rates=(0.1,),
    measured_rows=4,
    compression={"calibration_tokens": 512, "sequence_length": 64, "orders": [3], "evaluations": 2},
)
SCALES = {"gpu": GPU, "cpu": CPU, "tiny": TINY}
HEALING_SHARE = 0.05
