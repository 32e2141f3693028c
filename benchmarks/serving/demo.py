"""`make serve-demo`: serve the model of `make demo` on the CPU and ask it something with the official client."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import REPOSITORY
from benchmarks.serving.server import Server

MODEL = REPOSITORY / "demo" / "run" / "model"
PROMPT = '''class Stack:
    """A last-in, first-out list."""

    def __init__(self):
'''
TOKENS = 200
CONSOLE = Console(highlight=False)


def main() -> None:
    """Serve, ask, print the answer and how long it took."""
    if not MODEL.is_dir():
        CONSOLE.print("There is no demo model yet: it is trained first, which takes some minutes.")
        subprocess.run([sys.executable, "-m", "benchmarks.demo"], cwd=REPOSITORY, check=True)
    with tempfile.TemporaryDirectory() as folder:
        CONSOLE.print(f"\n$ tnl serve {MODEL.relative_to(REPOSITORY)}", style="bold")
        begin = time.perf_counter()
        server = Server(MODEL, Path(folder) / "log", "--enforce-eager", "--max-num-seqs", "8")
        CONSOLE.print(f"ready after {time.perf_counter() - begin:.0f} s at http://127.0.0.1:{server.port}/v1\n")
        try:
            ask(server)
        finally:
            server.stop()


def ask(server: Server) -> None:
    request = {"model": server.name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.6, "seed": 0}
    client = server.client()
    client.completions.create(**(request | {"max_tokens": 2}))  # the first request of a server is slow
    print(PROMPT, end="")
    times = [time.perf_counter()]
    for piece in client.completions.create(**request, stream=True, extra_body={"ignore_eos": True}):
        times.append(time.perf_counter())
        print(piece.choices[0].text if piece.choices else "", end="", flush=True)
    table = Table(title=f"{TOKENS} tokens after a prompt of {len(PROMPT)} bytes")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_row("time to first token", f"{1e3 * (times[1] - times[0]):.1f}")
    table.add_row("time per token after that", f"{1e3 * (times[-1] - times[1]) / (TOKENS - 1):.1f}")
    print("\n")
    CONSOLE.print(table)
