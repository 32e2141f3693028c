"""`tnl chat` with a model loaded here, and what it says where it cannot. Tier T0."""

import io
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


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        ChatSettings("folder", **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["no/such/folder", "http://127.0.0.1:9"])
def test_no_such_partner(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", target]) == 2
    assert capsys.readouterr().err.count("\n") == 1
