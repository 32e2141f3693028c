"""A whole step of decoding one row of TNL, from a token to the logits of the next, in one CUDA kernel.

With one row a layer takes the time of reading its weights, if nothing else stands in the way; a kernel for each of its
matrices takes about as long to start. Here blocks stay where they are for the whole step, and weights are asked for
long before it is their turn, while blocks wait for each other (`decode_step.cu`).

Dimensions: d width of the residual stream, H heads, E width of a head, I inner width, V vocabulary, L layers,
D width of a state's keys: E, or 2 E in a layer with LRPE.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (1024, 2048)  # a lane holds a 32nd of a row of float32 twice, in registers
WARPS = 8


@dataclass(frozen=True)
class StepLayer:
    """Weights of a layer, of one dtype, and its state.

    Attributes:
        qkvu: ``[4 H E, d]``, the projection of queries, keys, values and gates.
        out: ``[d, H E]``.
        gate: ``[I, d]``, one factor of the gated linear unit.
        up: ``[I, d]``, the other.
        down: ``[d, I]``.
        state: ``[1, H, D, E]`` float32, contiguous, updated in place.
        log_decay: ``[H]`` float32, or None for no decay in any layer.
        theta: ``[H, 1, E]`` float32 angles of LRPE, or None.
    """

    qkvu: Tensor
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    state: Tensor
    log_decay: Tensor | None = None
    theta: Tensor | None = None


class DecodeStep:
    """The step ``x = scale embed(token)``; ``x += GLA(norm(x))``, ``x += SGLU(norm(x))`` a layer; ``head norm(x)``.

    The norm is SRMSNorm, GLA and SGLU are those of TNL without variants (arXiv 2405.17381, section 3). The residual
    stream and all between the matrices is in float32. Programs add to sums in any order, so a step repeats up to
    the rounding of float32, not bit by bit.

    Output and down projections are copied, transposed, and so is what is not contiguous: weights that change later are
    not seen.

    Args:
        embedding: ``[V, d]``.
        layers: Weights and states.
        head: ``[V, d]``.
        embedding_scale: Factor of the embedding.
        norm_eps: Of every norm.

    Raises:
        ValueError: What the kernel does not serve (:func:`why_not`), or weights that do not fit; the message names it.
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[StepLayer],
        head: Tensor,
        *,
        embedding_scale: float,
        norm_eps: float,
    ) -> None:
        self.device, self.layers = head.device, layers
        self.heads, self.head_dim = layers[0].state.shape[1], layers[0].state.shape[3]
        self.width, self.inner = head.shape[1], layers[0].gate.shape[0]
        problem = why_not(self.device, head.dtype, self.width, self.heads, self.head_dim)
        if problem:
            raise ValueError(problem)
        self._check(embedding, head)
        self.embedding, self.head = _aligned(embedding), _aligned(head)
        self.embedding_scale, self.norm_eps = embedding_scale, norm_eps
        self.blocks = choose_blocks(self.device, self.heads, self.head_dim)
        self.out = torch.stack([layer.out.detach().T for layer in layers]).contiguous()
        self.down = torch.stack([layer.down.detach().T for layer in layers]).contiguous()
        decays = [layer.log_decay for layer in layers if layer.log_decay is not None]
        self.log_decay = torch.stack(decays).float().contiguous() if decays else None
        self._fields = [
            (_aligned(each.qkvu), out, _aligned(each.gate), _aligned(each.up), down, each.state, each.theta)
            for each, out, down in zip(layers, self.out, self.down, strict=True)
        ]
        addresses = [[0 if field is None else field.data_ptr() for field in fields] for fields in self._fields]
        addresses.append([self.head.data_ptr()] + [0] * (len(addresses[0]) - 1))
        self.table = torch.tensor(addresses, device=self.device)
        self.stream, self.attended = torch.zeros(2, 2, self.width, device=self.device)
        self.squares = torch.zeros(2, device=self.device)
        self.queries_keys = torch.zeros(2, self.heads, self.head_dim, device=self.device)
        self.counters = torch.zeros(32 + self.blocks + 32 * self.heads, dtype=torch.int32, device=self.device)

    def __call__(self, token: Tensor, position: Tensor, logits: Tensor) -> None:
        """Read a token.

        Args:
            token: ``[1]`` int64.
            position: ``[1]`` int64, the token's, read by LRPE; one more afterwards.
            logits: ``[1, V]``, contiguous, to write to.
        """
        from tnl.ops import decode_step_cuda

        decode_step_cuda.launch(self, token, position, logits)

    def _check(self, embedding: Tensor, head: Tensor) -> None:
        streams = self.heads * self.head_dim
        shapes = {
            "qkvu": (4 * streams, self.width),
            "out": (self.width, streams),
            "gate": (self.inner, self.width),
            "up": (self.inner, self.width),
            "down": (self.width, self.inner),
        }
        given = [("embedding", embedding, tuple(head.shape)), ("head", head, tuple(head.shape))]
        for number, layer in enumerate(self.layers):
            given += [(f"layers[{number}].{name}", getattr(layer, name), shape) for name, shape in shapes.items()]
        for name, tensor, shape in given:
            if tensor.shape != shape or tensor.dtype != head.dtype:
                raise ValueError(
                    f"{name}: expected {list(shape)} of {head.dtype}, got {list(tensor.shape)} of {tensor.dtype}"
                )
        for number, layer in enumerate(self.layers):
            width = self.head_dim * (1 if layer.theta is None else 2)
            expected = (1, self.heads, width, self.head_dim)
            if layer.state.shape != expected or layer.state.dtype != torch.float32 or not layer.state.is_contiguous():
                raise ValueError(
                    f"layers[{number}].state: expected contiguous {list(expected)} of torch.float32, "
                    f"got {list(layer.state.shape)} of {layer.state.dtype}"
                )
            if layer.theta is not None and (layer.theta.dtype != torch.float32 or not layer.theta.is_contiguous()):
                raise ValueError(f"layers[{number}].theta: expected contiguous float32, got {layer.theta.dtype}")


def why_not(device: torch.device, dtype: torch.dtype, width: int, heads: int, head_dim: int) -> str | None:
    """What the kernel cannot serve of a model with these dimensions; None where it serves it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9:
        return f"device: expected an NVIDIA GPU of compute capability 9.0 or more, got {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype: expected float16 or bfloat16, got {dtype}"
    if width not in WIDTHS:
        return f"width: expected one of {WIDTHS}, got {width}"
    if head_dim % 32 or head_dim > 256:
        return f"head_dim: expected a multiple of 32 up to 256, got {head_dim}"
    if choose_blocks(device, heads, head_dim) == 0:
        return f"heads: expected so many that columns of all share out among the processors, got {heads} of {head_dim}"
    return None


def choose_blocks(device: torch.device, heads: int, head_dim: int) -> int:
    """Blocks of 8, 16, .. columns of a head each, as many as the device holds at once; 0 for under half of these."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    columns = WARPS
    while columns <= head_dim and (head_dim % columns or heads * head_dim // columns > processors):
        columns *= 2
    blocks = heads * head_dim // columns if columns <= min(head_dim, 4 * WARPS) else 0
    return blocks if 2 * blocks >= processors else 0


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernel takes it for granted."""
    x = x.detach()
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
