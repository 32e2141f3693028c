"""Models for training, evaluation and generation: made by name, loaded from and saved to Hugging Face folders."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tnl.models import PRESETS, TnlConfig
from tnl.training.config import ModelSettings

VOCABULARY_MULTIPLE = 64  # the rows of embedding and head are rounded up to this: matrix products like it


def choose_device(device: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: `cuda` without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu or auto on a machine without a usable GPU, got 'cuda'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def build_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[PreTrainedModel, str | None]:
    """The model that the settings name, in float32, and the folder or hub name of its weights (None: new ones).

    Its parameters are on the meta device: they take no memory until they are laid out and :func:`fill_model` makes the
    share of this process.

    Raises:
        ValueError: No such model, an unknown field, or a model too small for the tokenizer or the rows.
    """
    config, weights = _configuration(settings, tokenizer)
    text_config = config.get_text_config()
    if text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.name: expected a vocabulary of at least the tokenizer's {len(tokenizer)} tokens, "
            f"got {text_config.vocab_size}"
        )
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and longest < sequence_length:
        raise ValueError(f"sequence_length: expected at most the model's {longest} positions, got {sequence_length}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model.name: expected a causal language model, got {settings.name!r}")
    with _parameters_without_memory():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model, weights


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """New modules have parameters on the meta device, and buffers as they should be."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already is being tied
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


@torch.no_grad()
def fill_model(model: PreTrainedModel, weights: str | None, device: torch.device) -> None:
    """Give a model of `build_model`, sharded or not, its weights: what this process has of them.

    New weights come from torch's generator, the same however the model is sharded. At most one parameter is whole at a
    time. All processes of a sharded model call it.
    """
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    model.tie_weights()
    if weights is None:
        _initialise(model, device)
    else:
        _read_weights(model, weights)


def _initialise(model: PreTrainedModel, device: torch.device) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module, owner in _inner_first(model, model):
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        for key, parameter in own.items():
            whole = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype, device=device)
            module._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        owner._init_weights(module)
        for key, parameter in own.items():
            made = module.get_parameter(key).detach()
            module._parameters[key] = parameter
            name = names.pop(id(parameter), None)
            if name is None:  # tied: it keeps its first values
                continue
            if made.isnan().any():
                raise ValueError(f"model.name: expected a model that makes new weights, got none for {name}")
            _keep_share(parameter, made)


def _inner_first(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """All modules, the order in which transformers initialises them, and the model whose rules hold for each."""
    for child in module.children():
        yield from _inner_first(child, child if isinstance(child, PreTrainedModel) else owner)
    yield module, owner


def _keep_share(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy from a whole tensor what a parameter, sharded or not, has of it."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
        parameter = parameter.to_local()
    parameter.copy_(whole)


def _read_weights(model: PreTrainedModel, weights: str) -> None:
    """From safetensors, only what this process has; other formats, and other names, by way of transformers."""
    folder = (
        weights if Path(weights).is_dir() else snapshot_download(weights, allow_patterns=["*.safetensors", "*.json"])
    )
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    state = model.state_dict()
    stored: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    wanted = {name: value for name, value in state.items() if name in stored or name not in tied}
    if wanted.keys() <= stored:
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(folder))
        return
    whole = AutoModelForCausalLM.from_pretrained(weights, config=model.config, dtype=torch.float32).state_dict()
    for name, value in state.items():
        _keep_share(value, whole[name])


def _configuration(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedConfig, str | None]:
    """The model's configuration, and the folder or hub name that its weights come from (None: new weights)."""
    name, overrides = settings.name, settings.overrides
    tokens = {
        "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name in PRESETS:
        try:
            return TnlConfig.from_preset(name, **(tokens | overrides)), None
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.overrides: {error}") from error
    if name in CONFIG_MAPPING:
        default = AutoConfig.for_model(name)
        _refuse_unknown(overrides, default.to_dict() | default.attribute_map)
        try:
            return AutoConfig.for_model(name, **(tokens | overrides)), None
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.overrides: {error}") from error
    if not Path(name).is_dir() and "/" not in name:
        raise ValueError(
            f"model.name: expected a preset ({', '.join(PRESETS)}), a folder or a model_type of transformers, "
            f"got {name!r}"
        )
    folder = str(find_model_folder(name)) if Path(name).is_dir() else name
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.name: expected a model in {folder!r}, found none that can be read ({reason})"
        ) from error
    _refuse_unknown(overrides, config.to_dict())
    for field, value in overrides.items():
        setattr(config, field, value)
    has_weights = not Path(folder).is_dir() or any(Path(folder).glob("*.safetensors"))
    return config, folder if has_weights else None


def _refuse_unknown(overrides: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = sorted(overrides.keys() - known.keys())
    if unknown:
        raise ValueError(f"model.overrides: expected fields of the model's configuration, got {', '.join(unknown)}")


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether positions that begin again keep a document from the one before it in the row; tried out on 8 tokens.

    Two rows differ in their first document only. What the second one's logits differ by, which is nothing where
    documents are apart, is held against what the first one's do, since new weights pass little on.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [4, 3, 2, 1, 1, 2, 3, 4]], device=device)
    was_training = model.training
    model.eval()
    one, other = (model(input_ids=row[None], position_ids=positions, use_cache=False).logits[0] for row in tokens)
    model.train(was_training)
    first, second = (one - other).float().abs().split(4)
    return bool(second.max() <= 1e-5 * first.max())


def find_model_folder(name: str) -> Path:
    """The folder itself, or `model/` inside the folder of a run.

    Raises:
        FileNotFoundError: There is no model.
    """
    for folder in (Path(name), Path(name) / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"model: expected a folder with a config.json, found none in {name}")


def load_model(name: str, device: torch.device, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder, ready for evaluation."""
    folder = find_model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: expected a tokenizer in {folder} ({str(error).splitlines()[0]})") from error
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder; one of the same name is replaced when the new one is complete.

    Args:
        model: The model.
        tokenizer: Saved beside it.
        folder: Where to.
        state: Whole tensors to save in place of the model's own (which may be shards).
    """
    unfinished, old = folder.with_name(f".unfinished-{folder.name}"), folder.with_name(f".old-{folder.name}")
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        for path in unfinished.iterdir():
            flush_to_disk(path)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"cannot write the model to {folder}: {error}") from error
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    flush_to_disk(folder.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def print_presets() -> None:
    """Print the presets of TNL as a table; parameters are counted without allocating any."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("preset", "parameters", "layers", "width", "heads", "vocabulary"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    for name in PRESETS:
        config = TnlConfig.from_preset(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        table.add_row(
            name,
            f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            str(config.num_hidden_layers),
            str(config.hidden_size),
            str(config.num_attention_heads),
            f"{config.vocab_size:,}",
        )
    Console().print(table)
