"""`tnl serve` over HTTP, asked by the official client. Tier T0, needs vLLM (`make test-serve`)."""

import concurrent.futures
import http.client
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.serving.server import Server
from tests.serving_models import Reference, load, references, save_tiny
from tnl.cli import main

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]  # a server starts slowly where much else runs

KEY = "a-key-of-the-test"
LONGEST = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16"]
    options += ["--max-model-len", str(LONGEST), "--max-num-batched-tokens", "256"]
    started = Server(folder, tmp_path_factory.mktemp("log") / "server.log", *options, key=KEY)
    yield started
    started.stop()
    assert started.process.returncode is not None


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Reference]:
    return references(folder, [1, 1, 2, 5, 17, 40, 90, 200, 257, 300, 600, 33])


def token_ids(choice: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]


def greedy(client: Any, server: Server, prompt: list[int], **options: Any) -> list[int]:
    """The 20 likeliest tokens after a prompt."""
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    request: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "logprobs": 0, "extra_body": extra}
    answer = client.completions.create(model=server.name, prompt=prompt, **(request | options))
    return token_ids(answer.choices[0])


def test_streaming(server: Server, expected: list[Reference]) -> None:
    client, each = server.client(), expected[6]
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    request = {"model": server.name, "prompt": each.prompt, "max_tokens": 400, "temperature": 0, "logprobs": 0}
    pieces = list(client.completions.create(**request, stream=True, extra_body=extra))
    got = [token for piece in pieces if piece.choices for token in token_ids(piece.choices[0])]
    assert len(got) == 400
    assert got[:20] == each.tokens
    assert len(pieces) > 10  # on a busy machine a piece may have many tokens
    whole = client.completions.create(**request, extra_body=extra).choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole


def test_stop_strings(server: Server, expected: list[Reference]) -> None:
    client = server.client()
    request = {"model": server.name, "prompt": expected[5].prompt, "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    stop = next(character for character in text[3:] if character.isascii() and character.isprintable())
    answer = client.completions.create(**request, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]


def test_n_seeds_and_logprobs(server: Server, folder: Path, expected: list[Reference]) -> None:
    client, each = server.client(), expected[10]  # its prompt is read in several chunks
    extra = {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = {"model": server.name, "prompt": each.prompt, "max_tokens": 12, "temperature": 1.0, "extra_body": extra}
    one = client.completions.create(**request, n=4, seed=7, logprobs=3)
    two = client.completions.create(**request, n=4, seed=7, logprobs=3)
    tokens = [token_ids(choice) for choice in one.choices]
    assert tokens == [token_ids(choice) for choice in two.choices]
    assert len({tuple(each) for each in tokens}) == 4
    for choice in one.choices:  # drawn side by side from one prompt, each by the model's own probabilities
        ids = torch.tensor([each.prompt + token_ids(choice)])
        with torch.no_grad():
            logits = load(folder)(ids).logits[0, len(each.prompt) - 1 : -1].float()
        right = logits.log_softmax(-1).gather(1, torch.tensor(token_ids(choice))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), right, rtol=1e-3, atol=1e-3)


def test_chat_template(server: Server, folder: Path) -> None:
    """The model has no template: it gets the plain one."""
    client = server.client()
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    request = {"model": server.name, "max_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(messages=talk, **request).choices[0].message.content
    prompt = list(b"Be brief.\nHuman:\nHello\nAssistant:\n")
    assert answer == client.completions.create(prompt=prompt, **request).choices[0].text
    stream = client.chat.completions.create(messages=talk, **request, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices) == answer


def test_tnl_chat(server: Server) -> None:
    command = [sys.executable, "-m", "tnl", "chat", f"http://127.0.0.1:{server.port}", "--api_key", KEY]
    command += ["--temperature", "0", "--max_new_tokens", "20"]
    talk = subprocess.run(command, input="Hello\n/new\nHello\n/quit\n", capture_output=True, text=True)
    assert talk.returncode == 0, talk.stderr
    request = {"model": server.name, "max_tokens": 20, "temperature": 0}
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.client().chat.completions.create(messages=messages, **request).choices[0].message.content
    assert talk.stdout == f"{answer}\n" * 2
    wrong = subprocess.run([*command[:-1], "0"], input="", capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"prompt": [1] * (LONGEST + 1)}, 400, "maximum context length is 4096"),
        ({"prompt": "a" * 10_000_000}, 400, "maximum context length is 4096"),
        ({"prompt": [3, -1]}, 400, "greater than or equal to 0"),
        ({"prompt": [3, 321]}, 400, "out of vocabulary"),
        ({"prompt": []}, 400, "at least one prompt"),
        ({"prompt": [3], "max_tokens": -1}, 400, "max_tokens must be at least 1"),
        ({"prompt": [3], "temperature": -1}, 400, "temperature"),
        ({"prompt": [3], "n": 0}, 400, "n must be at least 1"),
        ({"prompt": [3], "model": "unknown"}, 404, "does not exist"),
        ({"prompt": [3], "key": "wrong"}, 401, "Unauthorized"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_bad_requests(server: Server, request_: dict[str, Any], status: int, message: str) -> None:
    got, text = server.complete(**request_)
    assert got == status, text[:500]
    assert message in text
    assert server.complete(prompt=[3])[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "tnl", "prompt": [1', b"[]", b"\xff\xfe", b"null"])
def test_malformed_json(server: Server, body: bytes) -> None:
    status, text = server.ask("POST", "/v1/completions", body)
    assert 400 <= status < 500, text
    assert json.loads(text)["error"]["message"]
    assert server.complete(prompt=[3])[0] == 200


def test_clients_that_leave(server: Server, expected: list[Reference]) -> None:
    """Twice as many streams as there are states are cut after some tokens; their rows serve the next, clean."""
    client = server.client()
    for i in range(32):
        prompt = expected[i % len(expected)].prompt
        request = {"model": server.name, "prompt": prompt, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**request, stream=True)
        list(itertools.islice(stream, i % 5))
        stream.close()
    body = json.dumps({"model": server.name, "prompt": [1, 2], "max_tokens": 2000, "stream": True}).encode()
    for _ in range(8):  # those that do not even read the answer
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        connection.close()
    server.wait_until_idle()
    for each in expected:
        assert greedy(client, server, each.prompt) == each.tokens


def test_many_clients(server: Server, expected: list[Reference]) -> None:
    """200 requests from 32 clients with random lengths: nothing lost, nothing mixed up."""
    client = server.client()

    def one(number: int) -> None:
        draw = random.Random(number)
        each, count = draw.choice(expected), draw.randint(1, 20)
        assert greedy(client, server, each.prompt, max_tokens=count) == each.tokens[:count]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert len(list(pool.map(one, range(200)))) == 200
    server.wait_until_idle()


def test_memory_settles(server: Server, expected: list[Reference]) -> None:
    """A short form of `python -m benchmarks.serving soak`: what leaks grows with each hundred requests."""

    def ask(number: int) -> None:  # without the official client, which takes longer than the answer
        each = expected[number % len(expected)]
        options: dict[str, Any] = {"logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        status, text = server.complete(prompt=each.prompt, max_tokens=2, **options)
        assert status == 200, text
        assert json.loads(text)["choices"][0]["logprobs"]["tokens"] == [
            f"token_id:{token}" for token in each.tokens[:2]
        ]

    grown: list[int] = []
    while not grown or grown[-1] > 1 << 20:  # caches and allocators fill up, slower and slower
        before = server.memory()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(100)))
        server.wait_until_idle()
        grown.append(server.memory() - before)
        assert len(grown) <= 40, f"memory grew by {grown} bytes, with 100 requests each time"


def test_default_address_and_memory(server: Server) -> None:
    """It listens on this machine alone, and its pool holds as many states as may run and one more."""
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    ]
    assert listening == ["127.0.0.1"]
    metrics = server.ask("GET", "/metrics")[1]
    assert 'num_gpu_blocks="17"' in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder"),
        ([], "MODEL: expected a folder"),
        (["FOLDER", "--tensor-parallel-size", "3"], "tensor_parallel_size: expected a divisor of the 4 heads, got 3"),
        (["FOLDER", "--max-model-lenght", "5"], "--max-model-lenght"),
    ],
    ids=["model", "none", "heads", "option"],
)
def test_bad_command_line(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["serve", *(str(folder) if word == "FOLDER" else word for word in arguments)])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
