"""The settings of `tnl train`, `tnl eval` and `tnl generate`: typed, with their defaults, free of heavy imports.

A YAML file holds the fields of `TrainSettings`; the command line overrides single fields by their dotted name
(`--optimizer.learning_rate 1e-3`). An unknown field is an error.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

BYTES = "bytes"
BPE = "bpe"


@dataclass
class ModelSettings:
    """Which model is trained.

    Attributes:
        name: A preset of TNL (`tnl presets` lists them), a folder with a model (its weights are where training
            starts), or a `model_type` of transformers (random weights).
        overrides: Fields of the model's configuration to change, for example `{hidden_size: 256}`.
    """

    name: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class TokenizerSettings:
    """How text becomes tokens.

    Attributes:
        name: `bytes` (one token a byte, needs no file), `bpe` (byte-level BPE trained on the training data), or a
            folder or hub name of a pretrained tokenizer.
        vocabulary_size: Number of tokens of a `bpe` tokenizer.
    """

    name: str = BYTES
    vocabulary_size: int = 32000


@dataclass
class DataSettings:
    """Where text comes from and how it is cut into documents.

    Attributes:
        train: Sources of training text: files, folders, globs (plain, .gz or .xz; .jsonl, .parquet and .csv hold a
            document a row), `datasets:NAME[:CONFIGURATION[:SPLIT]]`, or folders that `tnl prepare` wrote.
        mixture: Instead of `train`: sources with the share of the rows that each gets, as `{prepared/books: 3,
            prepared/code: 1}`; shares need not add up to 1.
        held_out: Sources of held-out text. Without them, `held_out_fraction` of the training documents is held out.
        held_out_fraction: Share of whole documents that is held out when `held_out` is empty.
        separator: Text that separates the documents of one file; without it a file is one document.
        column: Name of the text column of structured sources.
        workers: Processes that read rows ahead of the training step; 0 reads in the main process.
    """

    train: str | list[str] = field(default_factory=list)
    mixture: dict[str, float] = field(default_factory=dict)
    held_out: str | list[str] = field(default_factory=list)
    held_out_fraction: float = 0.01
    separator: str | None = None
    column: str = "text"
    workers: int = 0


@dataclass
class OptimizerSettings:
    """AdamW and the schedule of its learning rate.

    Attributes:
        learning_rate: The highest learning rate.
        betas: Decay of AdamW's first and second moment.
        epsilon: AdamW's epsilon.
        weight_decay: Decoupled decay of matrices. Embeddings and tensors that are not matrices (norms, biases,
            rotation angles) do not decay.
        clip_norm: Gradients are scaled down to this norm; 0 leaves them.
        schedule: After the linear warm-up: `cosine` to `final_ratio`, `inverse_sqrt`, `constant`, or `wsd`
            (constant, then linear to `final_ratio` over the last `decay_fraction` of the steps).
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the steps in which `wsd` decays.
        final_ratio: Last learning rate over the highest (`cosine`, `wsd`).
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Literal["cosine", "inverse_sqrt", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_ratio: float = 0.1


@dataclass
class ParallelSettings:
    """How the model is laid out on the machine; none of it changes what is computed, but for rounding.

    Attributes:
        precision: `float32`, or `bfloat16`: parameters and optimiser in float32, matrix products in bfloat16
            (autocast in one process, FSDP2 mixed precision in several).
        compile: Compile every block, and the last norm, with torch.compile.
        activation_checkpointing: Compute the activations of a block again in the backward pass.
        context: Processes that share each row, a part of its tokens on each; the others share the rows of a batch.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    context: int = 1


@dataclass
class TrainSettings:
    """Everything `tnl train` needs.

    Attributes:
        output: Folder of the run: `model/` (Hugging Face folder), `checkpoints/`, `metrics.csv`, `metrics.jsonl`,
            `training.png`, `tensorboard/`, `config.yaml`, `data/` (tokens).
        sequence_length: Tokens in a row.
        batch_size: Rows in an optimiser step, over all processes.
        micro_batch_size: Rows in one forward pass of one process; 0 takes all rows of the process at once.
        steps: Optimiser steps.
        seed: Seeds the weights, the order of documents and the held-out split.
        device: `auto` takes a GPU where there is one.
        log_every: Steps between two lines of metrics.
        evaluate_every: Steps between two looks at the held-out text; 0 looks at the end only.
        evaluate_rows: Most rows of held-out text used each time; 0 takes all of them.
        checkpoint_every: Steps between two checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints that are kept.
        asynchronous_checkpoints: Go on training while a checkpoint is written; takes its size in main memory.
        tracker: Where metrics go besides files and TensorBoard: Weights & Biases or trackio, under the project `tnl`.
        max_skipped_steps: Steps in a row whose loss or gradient is not finite (they are skipped) that end the run.
        resume: Go on from the newest complete checkpoint in `output`, or begin where there is none; `--resume` alone
            means true.
    """

    output: str = "runs/tnl"
    model: ModelSettings = field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    sequence_length: int = 1024
    batch_size: int = 32
    micro_batch_size: int = 0
    steps: int = 1000
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_rows: int = 256
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    asynchronous_checkpoints: bool = True
    tracker: Literal["none", "wandb", "trackio"] = "none"
    max_skipped_steps: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        require("output", self.output, self.output != "", "the name of a folder")
        mixture = self.data.mixture
        one = bool(self.data.train) != bool(mixture) if mixture else bool(self.data.train)
        require("data.train", self.data.train, one, "at least one source of text, here or in data.mixture, not in both")
        require("data.mixture", mixture, all(weight > 0 for weight in mixture.values()), "shares above 0")
        require("sequence_length", self.sequence_length, self.sequence_length >= 2, "at least 2")
        fraction = self.data.held_out_fraction
        require("data.held_out_fraction", fraction, 0 <= fraction < 1, "at least 0 and below 1")
        for name in ("batch_size", "steps", "log_every", "keep_checkpoints", "max_skipped_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("micro_batch_size", "evaluate_every", "evaluate_rows", "checkpoint_every"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        optimizer = self.optimizer
        rate = optimizer.learning_rate
        require("optimizer.learning_rate", rate, rate > 0, "above 0")
        require("optimizer.betas", optimizer.betas, all(0 <= b < 1 for b in optimizer.betas), "between 0 and 1")
        require("optimizer.warmup_steps", optimizer.warmup_steps, optimizer.warmup_steps >= 0, "at least 0")
        for name in ("decay_fraction", "final_ratio"):
            value = getattr(optimizer, name)
            require(f"optimizer.{name}", value, 0 <= value <= 1, "between 0 and 1")
        for name in ("epsilon", "weight_decay", "clip_norm"):
            value = getattr(optimizer, name)
            require(f"optimizer.{name}", value, value >= 0, "at least 0")
        context = self.parallel.context
        require("parallel.context", context, context >= 1, "at least 1")
        divides = self.sequence_length % context == 0
        require("sequence_length", self.sequence_length, divides, f"a multiple of parallel.context, {context}")
        require("data.workers", self.data.workers, self.data.workers >= 0, "at least 0")
        require("seed", self.seed, self.seed >= 0, "at least 0")


@dataclass
class PrepareSettings:
    """Everything `tnl prepare` needs.

    Attributes:
        output: Folder to write: `shard-00000/` and on, `tokenizer/`, and at the end `prepared.json`. The same command
            again goes on where it was stopped.
        data: Sources of text, as in `data.train` of `tnl train`.
        tokenizer: The tokenizer, as in `tnl train`.
        separator: Text that separates the documents of one file; without it a file is one document.
        column: Name of the text column of structured sources.
        held_out_fraction: Share of whole documents that is held out, drawn by a hash of seed and name.
        seed: Seeds that draw.
        shard_bytes: Text of about this size goes into a shard; small files share one, large ones (`.jsonl`, saved
            datasets) are divided.
        processes: Shards that are written at the same time; 0 takes one process a core.
    """

    output: str
    data: list[str]
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    separator: str | None = None
    column: str = "text"
    held_out_fraction: float = 0.01
    seed: int = 0
    shard_bytes: int = 256 << 20
    processes: int = 0

    def __post_init__(self) -> None:
        require("data", self.data, bool(self.data), "at least one source of text")
        require("held_out_fraction", self.held_out_fraction, 0 <= self.held_out_fraction < 1, "at least 0 and below 1")
        require("shard_bytes", self.shard_bytes, self.shard_bytes >= 1, "at least 1")
        require("processes", self.processes, self.processes >= 0, "at least 0")


@dataclass
class PlanSettings:
    """Everything `tnl plan` needs.

    Attributes:
        model: A preset of TNL.
        gpus: Numbers of GPUs, one column each.
        overrides: Fields of the model's configuration to change.
        gpu: What kind: `H100`, `H200`, `A100`.
        gpus_per_node: GPUs that are joined by the fast links.
        sequence_length: Tokens in a row.
        batch_tokens: Tokens in an optimiser step over all GPUs; 0 takes one forward pass of each group
            that shares rows.
        micro_batch_size: Rows in one forward pass.
        context: GPUs that share each row.
        tensor: GPUs that share each layer.
        activation_checkpointing: Compute the activations of a block again in the backward pass.
        tokens: Token budget; 0 takes 20 for each parameter.
        flops_use: Share of the GPU's bfloat16 peak that forward and backward pass reach on one GPU, recomputation
            counted; 0 takes it from `measured`, or else the assumption 0.45.
        measured: CSV that `python -m benchmarks.scale` wrote on one GPU: the model nearest in size gives the rate.
        format: `table` for the terminal, `markdown` or `json`.
    """

    model: str
    gpus: list[int]
    overrides: dict[str, Any] = field(default_factory=dict)
    gpu: Literal["H100", "H200", "A100"] = "H100"
    gpus_per_node: int = 8
    sequence_length: int = 8192
    batch_tokens: int = 0
    micro_batch_size: int = 1
    context: int = 1
    tensor: int = 1
    activation_checkpointing: bool = False
    tokens: float = 0
    flops_use: float = 0.0
    measured: str | None = None
    format: Literal["table", "markdown", "json"] = "table"

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "sequence_length", "micro_batch_size", "context", "tensor"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        group = self.context * self.tensor
        for count in self.gpus:
            divides = count >= 1 and count % group == 0
            require("gpus", count, divides, f"at least 1, and a multiple of {group} (context times tensor)")
        divides = self.sequence_length % self.context == 0
        require("sequence_length", self.sequence_length, divides, f"a multiple of context, {self.context}")
        require("flops_use", self.flops_use, 0 <= self.flops_use <= 1, "between 0 and 1")
        for name in ("batch_tokens", "tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")


@dataclass
class EvaluationSettings:
    """Everything `tnl eval` needs.

    Attributes:
        model: Folder of a model (or the folder of a run).
        data: Sources of text, as in `data.train` of `tnl train`; none with `harness`.
        harness: Tasks of lm-evaluation-harness instead (the extra `eval`): names and YAML files, separated by commas.
        harness_examples: Most examples of each task; 0 takes all of them.
        separator: Text that separates the documents of one file; without it a file is one document.
        column: Name of the text column of structured sources.
        window: Tokens in one forward pass. A model with a state of constant size carries it from window to window,
            so the context is the whole document; another model sees `window` tokens, half of them new. A request of
            the harness that is longer loses its beginning.
        batch_size: Documents, or requests of the harness, read side by side.
        device: `auto` takes a GPU where there is one.
        dtype: Type of the weights and of the arithmetic.
        json: File for the totals.
        csv: File for one line a document, or metric of the harness.
    """

    model: str
    data: list[str] = field(default_factory=list)
    harness: str | None = None
    harness_examples: int = 0
    separator: str | None = None
    column: str = "text"
    window: int = 2048
    batch_size: int = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: str | None = None
    csv: str | None = None

    def __post_init__(self) -> None:
        wanted = "at least one source of text" if self.harness is None else "no source of text with harness"
        require("data", self.data, bool(self.data) == (self.harness is None), wanted)
        require("harness_examples", self.harness_examples, self.harness_examples >= 0, "at least 0")
        require("window", self.window, self.window >= 2, "at least 2")
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")


@dataclass
class GenerationSettings:
    """Everything `tnl generate` needs.

    Attributes:
        model: Folder of a model (or the folder of a run).
        prompt: Text to continue; `-` reads standard input.
        max_new_tokens: Most tokens written.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draws among this many likeliest tokens; 0 for all.
        top_p: Draws among the likeliest tokens that hold this share of the probability.
        min_p: Leaves out tokens whose probability is below this share of the likeliest one's.
        repetition_penalty: Above 1 makes repetition less likely.
        num_beams: Beams of a beam search; above 1 the text comes at the end instead of as it is written.
        seed: Seeds the draws.
        device: `auto` takes a GPU where there is one.
        dtype: Type of the weights and of the arithmetic.
    """

    model: str
    prompt: str
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        require("temperature", self.temperature, self.temperature >= 0, "at least 0")
        require("top_k", self.top_k, self.top_k >= 0, "at least 0")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        require("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0")
        require("num_beams", self.num_beams, self.num_beams >= 1, "at least 1")


@dataclass
class FinetuneSettings:
    """Everything `tnl finetune` needs.

    Attributes:
        model: Folder of a model (or the folder of a run).
        data: File of instructions: `.jsonl`, `.json`, `.csv` or `.parquet` with the columns `instruction`, `input`
            (may be empty or absent) and `output`.
        output: Folder of the run: `model/`, a Hugging Face folder, and `adapter/` with LoRA.
        lora_rank: Rank of the LoRA adapters in all linear layers of the blocks; 0 trains all weights.
        learning_rate: The highest learning rate; it falls to zero along a cosine.
        epochs: Passes over the data.
        batch_size: Examples in a step.
        longest: Most tokens of an example; what is beyond is cut off.
        seed: Seeds the adapters and the order of the examples.
        device: `auto` takes a GPU where there is one, which computes in bfloat16.
    """

    model: str
    data: str
    output: str = "runs/finetuned"
    lora_rank: int = 0
    learning_rate: float = 2e-4
    epochs: float = 3.0
    batch_size: int = 16
    longest: int = 2048
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require("output", self.output, self.output != "", "the name of a folder")
        require("lora_rank", self.lora_rank, self.lora_rank >= 0, "at least 0")
        for name in ("learning_rate", "epochs"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("batch_size", "longest"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a ValueError that names the setting, what was expected and what was given, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def make_folder(name: str, path: Path) -> None:
    """Make the folder that a setting names; an OSError that names the setting where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{name}: expected a folder, or a place to make one, got {path} ({error.strerror})") from error


def as_list(sources: str | list[str]) -> list[str]:
    """One source or several, as a list."""
    return [sources] if isinstance(sources, str) else list(sources)
