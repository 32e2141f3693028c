"""`tnl chat` with a model loaded here, and what it says where it cannot. Tier T0."""

import importlib.util
import io
import socket
from pathlib import Path

import pytest
import torch

from tests.serving_models import load, save_tiny
from tnl.cli import main
from tnl.serving.chat import ChatSettings, chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def talk(
    lines: str, settings: ChatSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(settings)
    return capsys.readouterr().out


def continuation(folder: Path, prompt: bytes, new_tokens: int) -> bytes:
    ids = torch.tensor([list(prompt)])
    output = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return bytes(token for token in output[0, len(prompt) :].tolist() if token < 256)


def test_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ChatSettings(str(folder), temperature=0, max_new_tokens=6, system="Be brief.")
    first = continuation(folder, b"Be brief.\nHuman:\nHello\nAssistant:\n", 6).decode(errors="replace")
    twice = talk("Hello\n\n/new\nHello\n/quit\nunread\n", settings, monkeypatch, capsys)
    assert twice == f"{first}\n{first}\n"
    longer = talk("Hello\nHello\n", settings, monkeypatch, capsys)
    assert longer.startswith(f"{first}\n")
    assert longer != twice  # the second question came with the first and its answer


def test_a_failing_answer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model knows fewer bytes than the tokenizer: the error of the thread that writes is raised here."""
    save_tiny(tmp_path, vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    monkeypatch.setattr("sys.stdin", io.StringIO("\N{GRINNING FACE}\n"))
    with pytest.raises(IndexError):
        chat(ChatSettings(str(tmp_path), temperature=0))


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        ChatSettings("folder", **{field: value})  # type: ignore[arg-type]


def test_no_such_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "no/such/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_such_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as silent:  # holds a port at which nobody listens
        silent.bind(("127.0.0.1", 0))
        assert main(["chat", f"http://127.0.0.1:{silent.getsockname()[1]}"]) == 2
    message = capsys.readouterr().err
    wanted = "the package openai" if importlib.util.find_spec("openai") is None else "no server answers"
    assert wanted in message
    assert message.count("\n") == 1
