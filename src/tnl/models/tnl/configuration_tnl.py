"""Configuration of TNL (TransNormerLLM) models and its presets."""

from typing import Any

from transformers import PreTrainedConfig

from tnl.slopes import DECAY_SCHEDULES

LRPE_CHOICES = ("first", "all", "none")
GATES = ("linear", "sigmoid", "low_rank_sigmoid", "none")
ACTIVATIONS = ("silu", "relu", "gelu", "sigmoid", "1+elu", "none")
NORMS = ("srms", "rms", "layer")
LAYER_TYPES = ("linear_attention", "full_attention")

# Width of a head is 128 in every released size. Sources of the sizes: docs/model.md.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 384,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "44m": {
        "vocab_size": 50257,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1280,
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "pad_token_id": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "385m": {},
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
    },
    "3b": {
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 6912,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
    },
    "15b": {
        "hidden_size": 5120,
        "num_hidden_layers": 42,
        "num_attention_heads": 40,
        "intermediate_size": 13440,
    },
}


class TnlConfig(PreTrainedConfig):
    """Configuration of a TNL model; the defaults are the released TransNormerLLM-385M.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Heads of the lightning attention; each has its own decay.
        intermediate_size: Inner width of the gated linear unit (SGLU).
        head_dim: Width of a head; `None` means `hidden_size // num_attention_heads`.
        lrpe_layers: Layers whose queries and keys carry the learnt relative position encoding
            (LRPE-d, arXiv 2307.14995 section 3.1.1), which doubles their width: `"first"`, `"all"`,
            `"none"` or a list of layer indices from 0.
        decay_schedule: Formula of the decay of each head and layer, see `tnl.slopes`: `"released"`,
            `"paper"`, `"uniform"`, `"none"`, `"ling"` or `"minimax"`.
        gate: What multiplies the normalised attention output: `"linear"`, a projection u of the input
            (TNL); `"sigmoid"` of that (MiniMax); `"low_rank_sigmoid"`, of a projection through `head_dim`
            channels; or `"none"`.
        hidden_act: Activation of queries and keys: `"silu"` (TNL), `"relu"`, `"gelu"`, `"sigmoid"`,
            `"1+elu"` or `"none"`.
        value_act: Activation of values, from the same list; TNL has `"none"`.
        glu_act: Activation in the gated linear unit, from the same list; TNL has `"none"`.
        norm_type: All norms: `"srms"`, without a weight (TNL); `"rms"`, the same with one; `"layer"`.
        layer_types: `"linear_attention"` or `"full_attention"` for each layer; `None` means linear
            attention in all. Full attention is softmax attention with rotary positions, as in hybrid
            models; its cache grows with the text.
        rope_theta: Base of the rotary positions.
        scale_embeddings: Whether token embeddings are multiplied by `sqrt(hidden_size)`.
        dropout: Probability of dropping an element of the embeddings and of what each block adds
            to the residual stream, in training.
        norm_eps: Added to the mean square inside every norm.
        initializer_range: Standard deviation of the initial weights.
        tie_word_embeddings: Whether the language-model head is the embedding matrix.
        tensor_networks: Matrices that are kept as tensor networks, as `tnl compress` leaves them: for the name of
            each what `MatrixNetwork.to_dict` gives.
        use_cache: Whether the model returns its recurrent states outside of training.
        pad_token_id: Id of padding; its embedding starts as zero and gets no gradient.
        bos_token_id: Id that begins a document.
        eos_token_id: Id, or ids, that end a document.

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    model_type = "tnl"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (a class attribute of transformers)

    vocab_size: int = 64000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    intermediate_size: int = 2816
    head_dim: int | None = None
    lrpe_layers: str | list[int] = "first"
    decay_schedule: str = "released"
    gate: str = "linear"
    hidden_act: str = "silu"
    value_act: str = "none"
    glu_act: str = "none"
    norm_type: str = "srms"
    layer_types: list[str] | None = None
    rope_theta: float = 10000.0
    scale_embeddings: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    tensor_networks: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None and self._divides(self.num_attention_heads, self.hidden_size):
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TnlConfig":
        """The configuration of a named size, with single fields replaced.

        Args:
            name: One of `PRESETS`: tiny, 44m, 385m, 1b, 3b, 7b, 15b.
            **overrides: Fields of `TnlConfig` that differ from the preset.

        Raises:
            ValueError: An unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        unknown = sorted(overrides.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"TnlConfig has no field {', '.join(unknown)}")
        return cls(**{**PRESETS[name], **overrides})

    def uses_lrpe(self, layer_idx: int) -> bool:
        """Whether the queries and keys of this layer carry LRPE; only linear attention does."""
        if not self.is_linear(layer_idx):
            return False
        if isinstance(self.lrpe_layers, str):
            return self.lrpe_layers == "all" or (self.lrpe_layers == "first" and layer_idx == 0)
        return layer_idx in self.lrpe_layers

    def is_linear(self, layer_idx: int) -> bool:
        """Whether this layer is linear attention rather than softmax attention."""
        return self.layer_types is None or self.layer_types[layer_idx] == "linear_attention"

    def state_shape(self, layer_idx: int) -> tuple[int, int, int]:
        """Shape `(H, D, E)` of the recurrent state of one sequence in a layer of linear attention."""
        assert self.head_dim is not None  # set by __post_init__
        key_width = 2 * self.head_dim if self.uses_lrpe(layer_idx) else self.head_dim
        return (self.num_attention_heads, key_width, self.head_dim)

    @staticmethod
    def _divides(divisor: object, number: object) -> bool:
        return isinstance(divisor, int) and isinstance(number, int) and divisor > 0 and number % divisor == 0

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            self._require(name, _is_integer(getattr(self, name)) and getattr(self, name) > 0, "an integer > 0")
        self._require(
            "head_dim",
            self.head_dim is not None and _is_integer(self.head_dim) and self.head_dim > 0,
            "an integer > 0, or None where num_attention_heads divides hidden_size "
            f"({self.num_attention_heads} and {self.hidden_size})",
        )
        for name in ("norm_eps", "initializer_range", "rope_theta"):
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a number > 0")
        self._require("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")
        for name in ("scale_embeddings", "tie_word_embeddings", "use_cache"):
            self._require(name, isinstance(getattr(self, name), bool), "a bool")
        for name, choices in (
            ("decay_schedule", DECAY_SCHEDULES),
            ("gate", GATES),
            ("hidden_act", ACTIVATIONS),
            ("value_act", ACTIVATIONS),
            ("glu_act", ACTIVATIONS),
            ("norm_type", NORMS),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        networks = self.tensor_networks
        valid = networks is None or (isinstance(networks, dict) and all(isinstance(v, dict) for v in networks.values()))
        self._require("tensor_networks", valid, "None or a dict of names and networks")
        self._check_layer_types()
        self._check_lrpe_layers()
        self._check_token_ids()

    def _check_layer_types(self) -> None:
        types = self.layer_types
        if types is None:
            return
        valid = isinstance(types, list) and len(types) == self.num_hidden_layers
        valid = valid and all(kind in LAYER_TYPES for kind in types)
        self._require("layer_types", valid, f"None or {self.num_hidden_layers} of {', '.join(LAYER_TYPES)}")
        even = self.head_dim is not None and self.head_dim % 2 == 0
        self._require("head_dim", even or "full_attention" not in types, "even where there is full attention")

    def _check_lrpe_layers(self) -> None:
        if isinstance(self.lrpe_layers, str):
            valid = self.lrpe_layers in LRPE_CHOICES
        else:
            valid = isinstance(self.lrpe_layers, list | tuple) and all(
                _is_integer(layer) and 0 <= layer < self.num_hidden_layers for layer in self.lrpe_layers
            )
        expected = f"one of {', '.join(LRPE_CHOICES)} or a list of layers in [0, {self.num_hidden_layers})"
        self._require("lrpe_layers", valid, expected)
        if not isinstance(self.lrpe_layers, str):
            self.lrpe_layers = sorted(set(self.lrpe_layers))

    def _check_token_ids(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            for token in given if isinstance(given, list) else [given]:
                valid = token is None or (_is_integer(token) and 0 <= token < self.vocab_size)
                self._require(name, valid, f"None or in [0, vocab_size={self.vocab_size})")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
