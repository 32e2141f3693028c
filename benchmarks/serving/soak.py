"""Memory of a server under load for minutes: its own processes' memory, a row every ten seconds."""

import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.serving.engine import VOCABULARY, machine, save_model
from benchmarks.serving.results import Row
from benchmarks.serving.server import Server

KEYS = ("second",)
CLIENTS = 16
EVERY = 10  # seconds
LONGEST = 3000  # tokens of a prompt


def measure(minutes: float) -> Iterator[Row]:
    """Rows until the time is over; clients send prompts of random lengths, and one in eight leaves in mid-stream."""
    with tempfile.TemporaryDirectory() as folder:
        save_model("TNL", Path(folder) / "model")
        options = ["--skip-tokenizer-init", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "8192"]
        server = Server(Path(folder) / "model", Path(folder) / "log", *options)
        try:
            yield from load(server, minutes)
        finally:
            server.stop()


def load(server: Server, minutes: float) -> Iterator[Row]:
    client, done, left, over = server.client(), [0] * CLIENTS, [0] * CLIENTS, threading.Event()

    def work(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            length = int(LONGEST ** draw.random())
            prompt = [draw.randrange(3, VOCABULARY) for _ in range(length)]
            extra = {"ignore_eos": True, "detokenize": False, "return_token_ids": True}
            request = {"model": server.name, "prompt": prompt, "max_tokens": draw.randint(1, 64), "extra_body": extra}
            stream = client.completions.create(**request, stream=True)
            if draw.random() < 1 / 8:
                next(iter(stream))
                left[number] += 1
            else:
                for _ in stream:
                    pass
                done[number] += 1
            stream.close()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(CLIENTS)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for tick in range(int(minutes * 60 / EVERY) + 1):
        time.sleep(max(0.0, begin + tick * EVERY - time.monotonic()))
        yield {
            "second": tick * EVERY, "finished": sum(done), "left": sum(left), "memory_mb": server.memory() / 1e6,
        } | machine(len(os.sched_getaffinity(0)))  # fmt: skip
    over.set()
    for thread in threads:
        thread.join(60)
