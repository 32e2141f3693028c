"""The command `tnl`: each sub-command parses its settings, then calls one function.

Input that cannot be used ends with exit code 2 and one line that says why; `--traceback` shows where it was found.
"""

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tnl.compression.settings import CompressSettings, ExpandSettings
from tnl.serving.chat import ChatSettings
from tnl.training.config import (
    EvaluationSettings,
    FinetuneSettings,
    GenerationSettings,
    PlanSettings,
    PrepareSettings,
    TrainSettings,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command: its help, its settings (None: it has none) and the function to call, as `module:name`.

    Fields of the settings without a default are given by their place on the command line; `several` is the help of
    a last one that takes any number of values. With `own_arguments` the function gets the rest of the command line.
    """

    help: str
    settings: type | None
    function: str
    several: dict[str, str] = dataclasses.field(default_factory=dict)
    own_arguments: bool = False

    def call(self, *arguments: Any) -> None:
        """Import the function and call it."""
        module, _, name = self.function.partition(":")
        function: Callable[..., object] = getattr(importlib.import_module(module), name)
        function(*arguments)


COMMANDS = {
    "train": Command(
        "train a model: tnl train CONFIG.yaml [--key value ...]", TrainSettings, "tnl.training.loop:train"
    ),
    "eval": Command(
        "loss, perplexity and bits per byte of a model on text; or tasks of lm-evaluation-harness",
        EvaluationSettings,
        "tnl.training.evaluation:run",
        {"data": "Sources of text, as in `data.train` of `tnl train`; none with --harness."},
    ),
    "generate": Command("continue a text", GenerationSettings, "tnl.training.generation:generate"),
    "serve": Command(
        "serve a model with vLLM: tnl serve MODEL [options of vLLM]",
        None,
        "tnl.serving.server:serve",
        own_arguments=True,
    ),
    "chat": Command("talk with a model, on a server or loaded here", ChatSettings, "tnl.serving.chat:chat"),
    "finetune": Command(
        "train a model on instructions, all its weights or LoRA adapters",
        FinetuneSettings,
        "tnl.training.finetune:finetune",
    ),
    "prepare": Command(
        "turn text into token shards that training maps into memory",
        PrepareSettings,
        "tnl.training.prepare:prepare",
        {"data": "Sources of text, as in `data.train` of `tnl train`."},
    ),
    "plan": Command(
        "memory, communication and time of a training run before it is started",
        PlanSettings,
        "tnl.training.plan:plan",
        {"gpus": "Numbers of GPUs, one column each."},
    ),
    "compress": Command(
        "store the large matrices of a TNL as tensor networks: tnl compress MODEL --budget 0.5 --data TEXT",
        CompressSettings,
        "tnl.compression.compress:compress",
    ),
    "expand": Command(
        "give a compressed TNL its dense matrices back", ExpandSettings, "tnl.compression.compress:expand"
    ),
    "presets": Command("list the model sizes that have a name", None, "tnl.training.model:print_presets"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    name = given[0] if given and given[0] in COMMANDS else ""
    try:
        name, settings = parse(given)
        quieten()
        COMMANDS[name].call(*settings)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # as a shell has it for a command that Ctrl-C ended
    except BrokenPipeError:  # the reader of our output, such as `head`, went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FloatingPointError as error:
        return _fail(name, error, traceback, code=1)
    except (ValueError, OSError) as error:
        return _fail(name, error, traceback, code=2)
    return 0


def parse(arguments: list[str]) -> tuple[str, list[Any]]:
    """Name and settings of the command that the arguments spell out.

    Raises:
        ValueError: They cannot be parsed; the message is one line.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    if arguments and arguments[0] in COMMANDS and COMMANDS[arguments[0]].own_arguments:
        return arguments[0], [arguments[1:]]
    parser = ArgumentParser(
        prog="tnl",
        description="Train, evaluate, compress, generate: TNL language models. --traceback shows where an error arose.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(exit_on_error=False)
        if command.settings is not None:
            _add_settings(sub, command)
        commands.add_subcommand(name, sub, help=command.help)
    if arguments[:1] == ["train"]:
        arguments = _spell_out_train(arguments)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(_in_our_words(str(error))) from error
    chosen = COMMANDS[parsed.command]
    if chosen.settings is None:
        return parsed.command, []
    fields = get_type_hints(chosen.settings)
    for name, kind in fields.items():
        if dataclasses.is_dataclass(kind) and parsed[parsed.command][name] is None:
            raise ValueError(f"{name}: expected settings, got nothing")
    values = vars(parser.instantiate(parsed)[parsed.command])
    given = {name: values[name] for name in values if name in fields}
    given |= {name: given[name] or [] for name in chosen.several}
    return parsed.command, [chosen.settings(**given)]


# What the parser says, and how the settings themselves say it.
REWORDED = (
    (r'^Parser key "([^"]+)"', r"\1"),
    (r"Expected (.+?)\. Got value: ", r"expected \1, got "),
    (r"a <class '(\w+)'>", r"\1"),
    (r"a typing\.Literal\[(.+?)\]", r"one of \1"),
    (r"Unable to load config '(.*)' - .*", r"expected settings, or a YAML file of them, got \1"),
)


def _in_our_words(message: str) -> str:
    message = " ".join(message.split())
    for theirs, ours in REWORDED:
        message = re.sub(theirs, ours, message)
    return message


def quieten() -> None:
    """Keep progress bars and warnings of transformers, datasets and the hub off the terminal, where ours are."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _add_settings(parser: Any, command: Command) -> None:
    if command.settings is TrainSettings:
        parser.add_argument(
            "--config", action="config", help="YAML file with any of these settings; first, it needs no --config"
        )
        parser.add_argument("--from", help="folder of a model (or of a run) to train on, with its tokenizer")
    parser.add_class_arguments(command.settings, as_positional=True, skip=set(command.several))
    fields = {field.name: field for field in dataclasses.fields(command.settings or object)}
    for name, text in command.several.items():
        (kind,) = get_args(get_type_hints(command.settings)[name])  # list[kind]
        needed = fields[name].default_factory is dataclasses.MISSING
        parser.add_argument(name, nargs="+" if needed else "*", type=kind, help=text)


def _spell_out_train(arguments: list[str]) -> list[str]:
    """`train FILE --resume --from MODEL` in the form that the parser knows.

    That is `train --config FILE --resume true --model.name MODEL --tokenizer.name MODEL`.
    """
    rest = arguments[1:]
    if rest and not rest[0].startswith("-"):
        _check_file(rest[0])
        rest = ["--config", *rest]
    for place, argument in enumerate(rest):
        following = rest[place + 1] if place + 1 < len(rest) else "--"
        if argument == "--resume" and following.startswith("-"):
            rest[place] = "--resume=true"
    for place, argument in enumerate(rest):
        name, equals, folder = argument.partition("=")
        if name == "--from" and (equals or place + 1 < len(rest)):
            folder = folder if equals else rest[place + 1]
            inside = os.path.join(folder, "model")  # of a run
            tokenizer = inside if os.path.isfile(os.path.join(inside, "config.json")) else folder
            rest[place : place + (1 if equals else 2)] = ["--model.name", folder, "--tokenizer.name", tokenizer]
            break
    return ["train", *rest]


def _check_file(path: str) -> None:
    """Refuse a file that holds no settings, a text say, all of which the parser's message would show."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError:
        return  # the parser names it
    except ValueError:
        settings = None
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected a YAML file, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: expected a YAML file of settings such as `steps: 1000`, got {path}")


def _fail(name: str, error: Exception, traceback: bool, code: int) -> int:
    if traceback:
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"tnl {name}: error: {message}".replace("tnl :", "tnl:"), file=sys.stderr)
    return code
