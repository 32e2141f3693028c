"""`make demo`: train a TNL on the source of Python's standard library, compare it with byte models, let it write.

Everything about the model is done by the commands that a user would type; they are printed before they run.
"""

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import REPOSITORY

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
HELD_OUT_SHARE = 1 / 20
PROMPT_BYTES = 600
CONSOLE = Console()


def copy_library(source: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Copy the library's Python files into target/train and target/held_out; the copies, whole files each."""
    copies: dict[str, list[Path]] = {"train": [], "held_out": []}
    for name in copies:
        shutil.rmtree(target / name, ignore_errors=True)
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        if NOT_LIBRARY & set(relative.parts) or path.stat().st_size == 0:
            continue
        is_held_out = zlib.crc32(relative.as_posix().encode()) < HELD_OUT_SHARE * 2**32
        copy = target / ("held_out" if is_held_out else "train") / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies["held_out" if is_held_out else "train"].append(copy)
    return copies["train"], copies["held_out"]


def contexts(content: bytes) -> Iterator[npt.NDArray[np.int64]]:
    """Each byte's two predecessors (newlines before the first) and the bytes themselves, three arrays [n]."""
    padded = np.frombuffer(b"\n\n" + content, dtype=np.uint8).astype(np.int64)
    yield from (padded[:-2], padded[1:-1], padded[2:])


def count_trigrams(contents: Iterable[bytes]) -> npt.NDArray[np.float32]:
    """How often each byte follows each two, [256, 256, 256]."""
    counts = np.zeros(256**3, dtype=np.int64)
    for content in contents:
        before, last, byte = contexts(content)
        np.add.at(counts, (before * 256 + last) * 256 + byte, 1)
    return counts.reshape(256, 256, 256).astype(np.float32)


def interpolate(counts: npt.NDArray[np.float32], shorter: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Witten-Bell: `(c(x, b) + n(x) p(b)) / (c(x) + n(x))`, n(x) the number of different bytes seen after context x.

    `shorter` are the probabilities p under the context without its first byte; an unseen context has those.
    """
    kinds = (counts > 0).sum(-1, keepdims=True, dtype=np.float32)
    total = counts.sum(-1, keepdims=True)
    unseen = total == 0
    return np.where(unseen, shorter, (counts + kinds * shorter) / np.where(unseen, 1, total + kinds))


def byte_model_scores(train: Iterable[bytes], held_out: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of the uniform, the order-0 and the order-2 byte model on held-out text."""
    trigrams = count_trigrams(train)
    bigrams = trigrams.sum(0)
    order_0 = interpolate(bigrams.sum(0), np.full(256, 1 / 256, dtype=np.float32))
    order_1 = interpolate(bigrams, order_0)
    order_2 = interpolate(trigrams, order_1)
    bits_0 = bits_2 = 0.0
    length = 0
    for content in held_out:
        before, last, byte = contexts(content)
        bits_0 -= np.log2(order_0[byte], dtype=np.float64).sum()
        bits_2 -= np.log2(order_2[before, last, byte], dtype=np.float64).sum()
        length += len(byte)
    return {"uniform": 8.0, "order 0": bits_0 / length, "order 2 (Witten-Bell)": bits_2 / length}


def run(*command: str, text: Path | None = None) -> None:
    """Print a command and run it in the repository's root; `text` gives its first bytes as standard input."""
    shown = shlex.join(command)
    if text is not None:
        shown = f"head -c {PROMPT_BYTES} {shlex.quote(str(text.relative_to(REPOSITORY)))} | {shown}"
    CONSOLE.print(f"\n$ {shown}", style="bold", highlight=False, markup=False, soft_wrap=True)
    given = None if text is None else text.read_bytes()[:PROMPT_BYTES]
    code = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, input=given).returncode
    if code != 0:  # the command has said why
        sys.exit(code)


def main(options: list[str]) -> None:
    """Run the demo; `options` are added to `tnl train` (`--steps 100` for a quick look)."""
    import torch

    demo = REPOSITORY / "demo"
    train, held_out = copy_library(Path(sysconfig.get_paths()["stdlib"]), demo)
    size = sum(path.stat().st_size for path in train)
    CONSOLE.print(
        f"Python's standard library: {len(train)} files ({size / 1e6:.1f} MB) to learn from, {len(held_out)} held out"
    )
    shutil.rmtree(demo / "run", ignore_errors=True)
    config = "configs/demo-gpu.yaml" if torch.cuda.is_available() else "configs/demo.yaml"
    run("tnl", "train", config, *options)
    if not (demo / "run" / "model").is_dir():
        sys.exit("the training was stopped before its end")
    run("tnl", "eval", "demo/run", "demo/held_out", "--json", "demo/scores.json", "--csv", "demo/scores.csv")

    scores = byte_model_scores((p.read_bytes() for p in train), (p.read_bytes() for p in held_out))
    scores["TNL"] = json.loads((demo / "scores.json").read_text())["bits_per_byte"]
    table = Table(title=f"Bits per byte on {len(held_out)} held-out files")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for name, bits in scores.items():
        table.add_row(name, f"{bits:.3f}")
    CONSOLE.print(table)

    example = max(held_out, key=lambda path: path.stat().st_size)
    CONSOLE.print(f"\nThe first {PROMPT_BYTES} bytes of a held-out file, {example.name}:\n")
    print(example.read_bytes()[:PROMPT_BYTES].decode(errors="ignore"), flush=True)
    run("tnl", "generate", "demo/run", "-", "--max_new_tokens", "400", "--temperature", "0.7", text=example)
    CONSOLE.print("\nThe plot of the training: demo/run/training.png, the model: demo/run/model", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
