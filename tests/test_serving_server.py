"""What `tnl serve` decides before vLLM starts. Tier T0; tests/test_serving_http.py is about the server itself."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.serving_models import save_tiny
from tnl.cli import main, parse
from tnl.models import TnlConfig
from tnl.serving.server import CHAT_TEMPLATE, has_chat_template, state_bytes


def test_state_bytes() -> None:
    config = TnlConfig.from_preset("385m")  # 24 layers of 8 heads of 128, the first with LRPE
    one = 4 * 8 * 128 * 128
    assert state_bytes(config) == 25 * one
    assert state_bytes(config, tensor_parallel=4) == 25 * one // 4
    assert state_bytes(config, pipeline_parallel=2) == 13 * one
    assert state_bytes(config, pipeline_parallel=24) == 2 * one


def test_chat_template(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert not has_chat_template(str(tmp_path))
    assert has_chat_template(str(tmp_path / "absent"))  # vLLM will say what is wrong
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    tokenizer.save_pretrained(tmp_path)
    assert has_chat_template(str(tmp_path))
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief.\nHuman:\nHello\nAssistant:\nYes?<|endoftext|>\nHuman:\nGo\nAssistant:\n"


def test_options_are_handed_on() -> None:
    assert parse(["serve", "model", "--any-option", "3"]) == ("serve", [["model", "--any-option", "3"]])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "model"]) == 2
    message = capsys.readouterr().err
    assert "pip install 'tnl[serve]'" in message
    assert message.count("\n") == 1
