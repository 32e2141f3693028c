"""A server started by `tnl serve` in a process of its own, for benchmarks, the demo and tests."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 1200  # seconds; only what is broken takes so long


class Server:
    """`tnl serve` in a process of its own; `name` is what requests call the model."""

    def __init__(self, folder: Path, log: Path, *options: str, key: str = "none") -> None:
        # Kept until the end, so that nobody else gets this port while vLLM starts, which listens there by this option.
        self.place = socket.socket()
        self.place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.place.bind(("127.0.0.1", 0))
        self.port = self.place.getsockname()[1]
        self.key, self.name = key, "tnl"
        command = [sys.executable, "-m", "tnl", "serve", str(folder), "--port", str(self.port), "--api-key", key]
        command += ["--served-model-name", self.name, *options]
        environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        environment.pop("TRITON_INTERPRET", None)
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + PATIENCE
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)

    def is_ready(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, str]:
        """Status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def complete(self, key: str | None = None, **request: Any) -> tuple[int, str]:
        body = json.dumps({"model": self.name, "temperature": 0, "max_tokens": 8} | request).encode()
        return self.ask("POST", "/v1/completions", body, key)

    def client(self, **options: Any) -> Any:
        import openai

        settings: dict[str, Any] = {
            "base_url": f"http://127.0.0.1:{self.port}/v1",
            "api_key": self.key,
            "max_retries": 0,
        }
        return openai.OpenAI(**(settings | options))

    def memory(self) -> int:
        """Bytes that the server's processes hold and share with no one else."""
        process = psutil.Process(self.process.pid)
        return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])

    def running(self) -> float:
        """Requests that the engine works on or holds back."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0] in names)

    def wait_until_idle(self) -> None:
        """Wait for the requests that clients have left to leave the engine too."""
        deadline = time.monotonic() + PATIENCE
        while self.running() > 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"requests are left in the engine after {PATIENCE} s")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it, and whatever of its processes does not end by itself within a minute."""
        self.place.close()
        if self.process.poll() is not None:
            return
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(processes, timeout=60)
        for process in left:
            process.kill()
        self.process.wait()
