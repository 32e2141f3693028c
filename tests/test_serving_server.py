"""What `tnl serve` decides before vLLM starts. Tier T0; tests/test_serving_http.py is about the server itself."""

import importlib.util

import pytest

from tnl.cli import main, parse
from tnl.models import TnlConfig
from tnl.serving.server import share_cores, state_bytes


def test_state_bytes() -> None:
    config = TnlConfig.from_preset("385m")  # 24 layers of 8 heads of 128, the first with LRPE
    one = 4 * 8 * 128 * 128
    assert state_bytes(config) == 25 * one
    assert state_bytes(config, tensor_parallel=4) == 25 * one // 4
    assert state_bytes(config, pipeline_parallel=2) == 13 * one
    assert state_bytes(config, pipeline_parallel=24) == 2 * one


@pytest.mark.parametrize(
    ("cores", "ranks", "shared"),
    [({0, 1, 2, 3}, 2, "0,1|2,3"), ({3, 5, 8}, 2, "3|5"), ({0, 1}, 2, "0|1"), ({4}, 2, "4|4"), ({0, 1}, 3, "0|1|0")],
)
def test_share_cores(cores: set[int], ranks: int, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores)
    assert share_cores(ranks) == shared


def test_options_are_handed_on() -> None:
    assert parse(["serve", "model", "--any-option", "3"]) == ("serve", [["model", "--any-option", "3"]])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "model"]) == 2
    message = capsys.readouterr().err
    assert "pip install 'tnl[serve]'" in message
    assert message.count("\n") == 1
