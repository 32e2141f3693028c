"""Folders of models and chat templates. Tier T0."""

from pathlib import Path

from transformers import AutoTokenizer

from tests.serving_models import save_tiny
from tnl.serving.folder import CHAT_TEMPLATE, find_model, has_chat_template


def test_find_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    assert find_model(str(run)) == str(run)
    (run / "model" / "config.json").touch()
    assert find_model(str(run)) == str(run / "model")
    assert find_model(str(run / "model")) == str(run / "model")
    assert find_model("organisation/name") == "organisation/name"


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
