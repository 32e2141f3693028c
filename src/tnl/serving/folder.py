"""A model's folder as the commands take it, and the chat template for models that have none."""

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"  # the prompts that TransNormerLLM was tuned with


def find_model(name: str) -> str:
    """The folder of the model where `name` is the folder of a run of `tnl train`; `name` itself otherwise."""
    folder = Path(name)
    in_run = folder / "model"
    return str(in_run) if not (folder / "config.json").is_file() and (in_run / "config.json").is_file() else name


def has_chat_template(tokenizer: str, **options: Any) -> bool:
    """Whether a tokenizer comes with a chat template; yes as well where it cannot be read, of which others tell.

    Args:
        tokenizer: Folder or repository.
        **options: For `AutoTokenizer.from_pretrained`.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, **options)
    except (OSError, ValueError, KeyError):
        return True
    return loaded.chat_template is not None
