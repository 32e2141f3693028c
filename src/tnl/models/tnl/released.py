"""Reader of the released TransNormerLLM folders (`model_type: "transnormer"`).

The tensors decide the dims and the layers that carry LRPE; the configuration file is asked where they
do not tell, since not every released folder has one that fits.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.modeling_tnl import TnlForCausalLM

Shape = tuple[int, ...]


class ReleasedTensor(NamedTuple):
    """One row of the key map: name in the released file, our name, names of its dims."""

    name: str
    own_name: str
    dims: tuple[str, ...]


LRPE_NAME = "model.layers.{i}.token_mixer.lrpe.theta"  # only in layers with LRPE

KEY_MAP = (
    ReleasedTensor("model.embed_tokens.weight", "model.embed_tokens.weight", ("vocabulary", "width")),
    ReleasedTensor("lm_head.weight", "lm_head.weight", ("vocabulary", "width")),
    ReleasedTensor(
        "model.layers.{i}.token_mixer.qkvu_proj.weight",
        "model.layers.{i}.attention.qkvu_proj.weight",
        ("four_inner", "width"),
    ),
    ReleasedTensor(
        "model.layers.{i}.token_mixer.out_proj.weight",
        "model.layers.{i}.attention.o_proj.weight",
        ("width", "inner"),
    ),
    ReleasedTensor(LRPE_NAME, "model.layers.{i}.attention.lrpe.theta", ("heads", "one", "head_dim")),
    ReleasedTensor(
        "model.layers.{i}.channel_mixer.l1.weight", "model.layers.{i}.mlp.gate_proj.weight", ("glu", "width")
    ),
    ReleasedTensor("model.layers.{i}.channel_mixer.l2.weight", "model.layers.{i}.mlp.up_proj.weight", ("glu", "width")),
    ReleasedTensor(
        "model.layers.{i}.channel_mixer.l3.weight", "model.layers.{i}.mlp.down_proj.weight", ("width", "glu")
    ),
)


class TransnormerConfig(PreTrainedConfig):
    """The configuration file of a released folder; `None` where it does not say.

    Args:
        decoder_layers: Number of layers.
        decoder_attention_heads: Number of heads.
        no_scale_embedding: Whether embeddings are used without the factor `sqrt(width)`.
        norm_type: Kind of norm; all released models have `"simplermsnorm"`.
        linear_act_fun: Activation of queries and keys; all released models have `"silu"`.
        init_std: Standard deviation of the initial weights.
        use_cache: Whether the model returns its recurrent states.
        pad_token_id: Id of padding.
        bos_token_id: Id that begins a document.
        eos_token_id: Id that ends a document.
    """

    model_type = "transnormer"

    decoder_layers: int | None = None
    decoder_attention_heads: int | None = None
    no_scale_embedding: bool = False
    norm_type: str = "simplermsnorm"
    linear_act_fun: str = "silu"
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2


class TransnormerForCausalLM:
    """Loads a released folder as a `TnlForCausalLM`; what `AutoModelForCausalLM` finds for one."""

    config_class = TransnormerConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: TransnormerConfig | None = None,
        revision: str = "main",
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a released TransNormerLLM.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository on the Hugging Face Hub.
            config: Its configuration, read from the folder by default.
            revision: Revision of the repository.
            cache_dir: Where downloads are kept.
            token: Access token of the Hub.
            local_files_only: Whether to download nothing.
            **kwargs: Passed to `TnlForCausalLM.from_pretrained`, such as `dtype` or `device_map`.

        Returns:
            A `TnlForCausalLM` in evaluation mode. `save_pretrained` writes it in the format of this package.

        Raises:
            ValueError: Files are absent or unreadable, or tensors are missing, surplus or misshapen; the
                message lists them.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=["*.safetensors", "*.json"],
                )
            )
        if config is None:
            config = TransnormerConfig.from_pretrained(folder)
        files = find_weight_files(folder)
        own_config, own_names = plan_conversion(read_shapes(files), config, str(folder))
        kwargs.pop("_from_auto", None)
        model = TnlForCausalLM.from_pretrained(
            None, config=own_config, state_dict=read_tensors(files, own_names), **kwargs
        )
        if (folder / GENERATION_CONFIG_NAME).is_file():
            loaded = model[0] if isinstance(model, tuple) else model  # a tuple with output_loading_info
            loaded.generation_config = GenerationConfig.from_pretrained(folder)
        return model


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or as its index lists them.

    Raises:
        ValueError: There are none, or a file of the index is absent.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks files that {index.name} lists: {', '.join(absent)}")
        return [folder / name for name in names]
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    raise ValueError(
        f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; weights in pickle "
        "files (.bin) are not read, convert them to safetensors first"
    )


def read_shapes(files: list[Path]) -> dict[str, Shape]:
    """Shapes of all tensors by name, from the headers alone."""
    shapes: dict[str, Shape] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return shapes


def read_tensors(files: list[Path], own_names: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors under our names."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {own_names[name]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def plan_conversion(
    shapes: Mapping[str, Shape], config: TransnormerConfig, source: str
) -> tuple[TnlConfig, dict[str, str]]:
    """Our configuration and our name of each tensor, for tensors of these shapes.

    Args:
        shapes: Shape of each tensor of the released checkpoint by its name.
        config: Its configuration file.
        source: What error messages call the checkpoint.

    Raises:
        ValueError: Tensors are missing, surplus or misshapen, or the configuration asks for an activation
            or norm that no released model has.
    """
    for field, expected in (("norm_type", "simplermsnorm"), ("linear_act_fun", "silu")):
        if getattr(config, field) != expected:
            raise ValueError(f"{field} must be {expected!r}, got {getattr(config, field)!r} in {source}")
    layers = _count_layers(shapes, config)
    table = _expand_key_map(layers, shapes)
    dims = _find_dims(table, shapes, config)
    missing = [name for name in table if name not in shapes]
    surplus = [name for name in shapes if name not in table]
    misshapen = []
    for name in table.keys() & shapes.keys():
        wanted = tuple(dims.get(dim) for dim in table[name].dims)
        if shapes[name] != wanted:
            misshapen.append(f"{name} (expected {list(wanted)}, got {list(shapes[name])})")
    problems = [
        f"{kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{source} is not a TransNormerLLM of {layers} layers; " + "; ".join(problems))
    if "heads" not in dims:
        raise ValueError(
            f"decoder_attention_heads must divide the width {dims['inner']} of the attention, "
            f"got {config.decoder_attention_heads} in {source}"
        )
    own_config = TnlConfig(
        vocab_size=dims["vocabulary"],
        hidden_size=dims["width"],
        num_hidden_layers=layers,
        num_attention_heads=dims["heads"],
        head_dim=dims["head_dim"],
        intermediate_size=dims["glu"],
        lrpe_layers=[i for i in range(layers) if LRPE_NAME.format(i=i) in shapes],
        scale_embeddings=not config.no_scale_embedding,
        initializer_range=config.init_std,
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        dtype=config.dtype,
    )
    return own_config, {name: row.own_name for name, row in table.items()}


def _count_layers(shapes: Mapping[str, Shape], config: TransnormerConfig) -> int:
    """Layers that there are tensors of; more if the configuration says so, whose tensors are then missing."""
    found = [int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    return max([index + 1 for index in found] + [config.decoder_layers or 1])


def _expand_key_map(layers: int, shapes: Mapping[str, Shape]) -> dict[str, ReleasedTensor]:
    """The row of each tensor that a checkpoint of so many layers holds."""
    table: dict[str, ReleasedTensor] = {}
    for row in KEY_MAP:
        for i in range(layers) if "{i}" in row.name else [0]:
            name = row.name.format(i=i)
            if row.name != LRPE_NAME or name in shapes:
                table[name] = row._replace(name=name, own_name=row.own_name.format(i=i))
    return table


def _find_dims(
    table: Mapping[str, ReleasedTensor], shapes: Mapping[str, Shape], config: TransnormerConfig
) -> dict[str, int]:
    """The size of each named dim on which most tensors agree, so that a few wrong ones stand out."""
    votes: dict[str, Counter[int]] = {}
    for name, row in table.items():
        if len(shapes.get(name, ())) == len(row.dims):
            for dim, size in zip(row.dims, shapes[name], strict=True):
                if dim == "four_inner" and size % 4 == 0:
                    dim, size = "inner", size // 4
                votes.setdefault(dim, Counter())[size] += 1
    dims = {dim: counter.most_common(1)[0][0] for dim, counter in votes.items()}
    dims["one"] = 1
    if "inner" in dims:
        dims["four_inner"] = 4 * dims["inner"]
        if dims.get("heads", 0) * dims.get("head_dim", 0) != dims["inner"]:
            dims.pop("heads", None)
            dims.pop("head_dim", None)
            heads = config.decoder_attention_heads or 0
            if heads > 0 and dims["inner"] % heads == 0:
                dims |= {"heads": heads, "head_dim": dims["inner"] // heads}
    return dims
