"""What is measured: sizes by name. ``decode``, ``host`` and ``compile`` measure something else than a call's time."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    B: int
    H: int
    T: int
    D: int = 128
    E: int = 128
    per_token: bool = False
    documents: int = 0  # packed into one row of B * T tokens where above 0
    peers: bool = True
    official: bool = False  # lightning-attn too, which compiles anew for every size


def lengths(B: int, H: int, *tokens: int) -> list[Sizes]:
    return [Sizes(B, H, T) for T in tokens]


WIDE = Sizes(4, 32, 8192, peers=False)
GPU = {
    "many-heads": [
        *lengths(8, 32, 512),
        *lengths(4, 32, 1024, 2048),
        Sizes(4, 32, 8192, official=True),
        *lengths(4, 32, 32768),
    ],
    "few-heads": [*lengths(1, 16, 8192, 131072), *lengths(1, 8, 131072), Sizes(1, 4, 262144), Sizes(1, 8, 1 << 20)],
    "widths": [
        replace(WIDE, H=heads, D=D, E=E)
        for heads, D, E in ((64, 64, 64), (32, 96, 96), (16, 192, 192), (16, 256, 256), (16, 256, 128))
    ],
    "per-token": [replace(WIDE, per_token=True, peers=True)],
    "packed": [replace(WIDE, documents=n) for n in (4, 16, 64)],
}
CPU = {"cpu": [Sizes(1, 8, T, 64, 64) for T in (1024, 4096, 16384)]}
DECODE_ROWS = (1, 64, 256)


@dataclass(frozen=True)
class MiniMaxLayer:
    """A layer of transformers' MiniMax: channels of the model, heads, their width, lengths to measure."""

    width: int
    heads: int
    head_dim: int
    tokens: tuple[int, ...]


MINIMAX = {
    "cpu": MiniMaxLayer(512, 8, 64, (1024, 4096, 8192)),
    "cuda": MiniMaxLayer(6144, 64, 128, (1024, 8192, 32768)),  # that of MiniMax-Text-01
}
