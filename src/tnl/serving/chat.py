"""`tnl chat`: talk with a model in the terminal, on a server or in this process."""

import importlib.util
import os
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tnl.serving.folder import CHAT_TEMPLATE, find_model

Message = dict[str, str]
HELP = "/new starts over, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatSettings:
    """Everything `tnl chat` needs.

    Attributes:
        target: Address of a server, such as http://127.0.0.1:8000, or the folder of a model (or of a run) to load here.
        system: What the model is told before the first message; nothing by default.
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_p: Draws among the likeliest tokens that hold this share of the probability.
        seed: Seeds the draws.
        api_key: Key of the server; by default the environment variable OPENAI_API_KEY.
        device: Of a model loaded here; `auto` takes a GPU where there is one.
        dtype: Of a model loaded here.
    """

    target: str
    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    api_key: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


class Partner(Protocol):
    """Whoever answers."""

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """The answer to a conversation, piece by piece as it is written."""


class ServedModel:
    """A model behind an OpenAI-compatible server.

    Raises:
        ValueError: The package openai is absent, or the server cannot be reached or refuses the key.
    """

    def __init__(self, settings: ChatSettings) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ValueError("talking with a server needs the package openai; `pip install openai`")
        import openai

        self.settings = settings
        self.error: type[Exception] = openai.OpenAIError
        address = settings.target.rstrip("/")
        address = address if address.endswith("/v1") else f"{address}/v1"
        key = settings.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=address, api_key=key)
        try:
            self.model = self.client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise ValueError(f"target: no server answers at {address} ({error})") from None

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """As in `Partner`."""
        settings = self.settings
        request: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True}
        request |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
        try:
            with self.client.chat.completions.create(**request, max_tokens=settings.max_new_tokens) as stream:
                for event in stream:
                    if event.choices and event.choices[0].delta.content:
                        yield event.choices[0].delta.content
        except self.error as error:
            raise ValueError(f"the server refused: {error}") from None


class LoadedModel:
    """A model of a folder in this process.

    Raises:
        ValueError: It has no tokenizer.
        OSError: It cannot be read.
    """

    def __init__(self, settings: ChatSettings) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import tnl.models  # noqa: F401 (registers the models with transformers)

        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings = settings
        folder = find_model(settings.target)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = CHAT_TEMPLATE.read_text()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
        self.model = model.to(device).eval()
        torch.manual_seed(settings.seed)

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """As in `Partner`."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        settings = self.settings
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature > 0 else {}
        stopped = False
        options: dict[str, Any] = {
            "input_ids": prompt["input_ids"].to(self.model.device),
            "attention_mask": prompt["attention_mask"].to(self.model.device),
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": settings.temperature > 0,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([lambda ids, scores: stopped]),
        }

        def write() -> None:
            try:
                self.model.generate(**options, **sampling)
            finally:
                streamer.end()  # whoever reads would wait for ever for an answer that failed

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            try:
                yield from streamer
                writing.result()
            finally:  # Ctrl-C, or the end
                stopped = True


def chat(settings: ChatSettings) -> None:
    """Answer lines of standard input until it ends.

    Raises:
        ValueError: There is no such server or model.
        OSError: The model cannot be read.
    """
    is_server = settings.target.startswith(("http://", "https://"))
    partner: Partner = ServedModel(settings) if is_server else LoadedModel(settings)
    start = [{"role": "system", "content": settings.system}] if settings.system else []
    messages = list(start)
    if sys.stdin.isatty():
        print(HELP)
    while (line := _read()) is not None and line != "/quit":
        if line == "/new":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _print(partner.answer(messages))})


def _read() -> str | None:
    """The next line, or `None` after the last."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _print(pieces: Generator[str, None, None]) -> str:
    """Print an answer as it comes; returns it, as far as it came."""
    written = []
    try:
        for piece in pieces:
            written.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)
    return "".join(written)
