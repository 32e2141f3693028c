"""The command line: train, evaluate, generate; what bad input and a full disk do. Tier T0."""

import contextlib
import csv
import io
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tnl.cli import COMMANDS, main, parse

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48}"
CONFIG = f"""
model: {{name: tiny, overrides: {SMALL}}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
sequence_length: 32
batch_size: 4
steps: 6
log_every: 2
checkpoint_every: 3
device: cpu
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        (folder / f"{i:02d}.txt").write_text(f"Document {i} says: " + f"{i} is {i * i} squared. " * (1 + i % 5))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def model(config: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("run")
    assert main(["train", config, "--output", str(output), "--data.train", str(corpus)]) == 0
    return str(output)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line on standard error of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    name, (settings,) = parse(["train", str(path)])
    assert name == "train"
    assert settings.data.train


def test_settings_from_file_and_command_line(config: str) -> None:
    options = ["--data.train", "a.txt", "--optimizer.learning_rate", "1e-2", "--steps", "9", "--resume"]
    _, (settings,) = parse(["train", config, *options])
    assert (settings.data.train, settings.steps, settings.resume) == ("a.txt", 9, True)
    assert (settings.optimizer.learning_rate, settings.optimizer.warmup_steps) == (1e-2, 2)
    assert settings.model.overrides["hidden_size"] == 32
    _, (settings,) = parse(["train", config, "--data.train", "[a.txt, b.txt]", "--resume", "false"])
    assert (settings.data.train, settings.resume) == (["a.txt", "b.txt"], False)
    for options in (["--from", "some/run"], ["--from=some/run"]):
        _, (settings,) = parse(["train", config, "--data.train", "a.txt", *options])
        assert (settings.model.name, settings.tokenizer.name) == ("some/run", "some/run")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in COMMANDS if not command else []:
        assert name in text
    settings = COMMANDS[command].settings if command else None
    for field in getattr(settings, "__dataclass_fields__", ()):
        assert field in text


def test_evaluation_writes_table_json_and_csv(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(corpus / "03.txt"), str(corpus / "07.txt")]
    assert main(["eval", model, *files, "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]) == 0
    assert "bits/byte" in capsys.readouterr().out
    total = json.loads((tmp_path / "a.json").read_text())
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == files
    assert total["text_bytes"] == sum(int(row["text_bytes"]) for row in rows) == total["tokens"]
    assert 2 < total["bits_per_byte"] < 8.5


def test_generation_reads_the_prompt_and_repeats_by_seed(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_new_tokens", "20", "--seed", "3", "--top_k", "50", "--repetition_penalty", "1.1"]

    def written(prompt: str, *more: str) -> str:
        capsys.readouterr()
        assert main(["generate", model, prompt, *options, *more]) == 0
        return capsys.readouterr().out

    first = written("Document 3 says")
    assert written("Document 3 says") == first
    monkeypatch.setattr("sys.stdin", io.StringIO("Document 3 says"))
    assert written("-") == first
    assert written("Document 3 says", "--seed", "4") != first
    assert written("Document 3 says", "--temperature", "0") == written(
        "Document 3 says", "--num_beams", "1", "--temperature", "0"
    )
    assert written("Document 3 says", "--num_beams", "2")


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    output = capsys.readouterr().out
    assert "tiny" in output
    assert "464,520,192" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tnl: error: .*train,eval,generate"),
        (["nonsense"], "tnl: error: .*nonsense"),
        (["train", "nowhere.yaml"], "tnl train: error: .*nowhere.yaml"),
        (["train", "CONFIG"], "tnl train: error: data.train: expected at least one source"),
        (["train", "CONFIG", "--data.train", "nowhere"], "tnl train: error: data: no such file.*nowhere"),
        (["train", "CONFIG", "--stepz", "3"], "tnl train: error: .*stepz"),
        (["train", "CONFIG", "--steps", "many"], "tnl train: error: steps: expected int, got many"),
        (["train", "CONFIG", "--device", "gpu"], "device: expected one of 'auto', 'cpu', 'cuda', got gpu"),
        (["train", "CONFIG", "--model", "tiny"], "model: expected settings, or a YAML file of them, got tiny"),
        (["train", "CONFIG", "--data.train", "CORPUS", "--sequence_length", "1"], "sequence_length: .*2, got 1"),
        (["train", "CONFIG", "--data.train", "CORPUS", "--model.name", "huge"], "model.name: .*tiny.*got 'huge'"),
        (["train", "BROKEN"], "tnl train: error: "),
        (["train", "UNKNOWN"], "tnl train: error: .*learning_speed"),
        (["train", "NOTHING"], "tnl train: error: optimizer: expected settings, got nothing"),
        (["train", "EMPTY"], "config: expected a YAML file of settings"),
        (["eval", "nowhere", "CORPUS"], "tnl eval: error: model: .*nowhere"),
        (["eval", "MODEL", "nowhere"], "tnl eval: error: data: no such file.*nowhere"),
        (["eval", "MODEL", "EMPTY"], "tnl eval: error: data: expected text"),
        (["generate", "nowhere", "a"], "tnl generate: error: model: .*nowhere"),
        (["generate", "MODEL", "a", "--top_p", "2"], "tnl generate: error: top_p: .*got 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, config: str, corpus: Path, model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.yaml").write_text("steps: [1")
    (tmp_path / "unknown.yaml").write_text("optimizer:\n  learning_speed: 3\n")
    (tmp_path / "nothing.yaml").write_text("steps: 3\noptimizer:\n")
    stands_for = {
        "CONFIG": config,
        "CORPUS": str(corpus),
        "MODEL": model,
        "EMPTY": str(tmp_path / "empty.txt"),
        "BROKEN": str(tmp_path / "broken.yaml"),
        "UNKNOWN": str(tmp_path / "unknown.yaml"),
        "NOTHING": str(tmp_path / "nothing.yaml"),
    }
    given = [stands_for.get(argument, argument) for argument in arguments]
    if given[:1] == ["train"]:
        given += ["--output", str(tmp_path / "run")]
    assert re.search(message, error_of(capsys, *given))


def test_full_disk_while_tokens_are_written(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.txt").write_text("a line of text\n" * 2000)
    arguments = ["train", config, "--output", str(tmp_path / "run"), "--data.train", str(tmp_path / "long.txt")]
    with files_up_to(10_000):
        assert "File too large" in error_of(capsys, *arguments)
    assert list((tmp_path / "run" / "data").iterdir()) == []


def test_full_disk_while_a_checkpoint_is_written(
    config: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from step 4 on: the checkpoint of step 3 stays, and the run goes on from it later."""
    from tnl.training import loop

    arguments = ["train", config, "--output", str(tmp_path), "--data.train", str(corpus)]
    take_step = loop.take_step
    stack = contextlib.ExitStack()

    def fill_disk(run: loop.Run, step: int, *rest: object) -> loop.StepResult:
        if step == 4:
            run.checkpoints.finish()  # of step 3, which is written while training goes on
            stack.enter_context(files_up_to(50_000))
        return take_step(run, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, stack:
        patch.setattr(loop, "take_step", fill_disk)
        message = error_of(capsys, *arguments)
    assert "cannot write checkpoint" in message
    assert "File too large" in message
    assert "step-00000006" in message
    assert "newest complete one: " + str(tmp_path / "checkpoints" / "step-00000003") in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (tmp_path / "model").exists()
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_full_disk_while_the_model_is_written(
    config: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older model folder stays as it is."""
    from tnl.training import loop

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    arguments = ["train", config, "--output", str(tmp_path), "--data.train", str(corpus)]
    export = loop.export

    def fill_disk(*rest: object) -> None:
        with files_up_to(50_000):
            export(*rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "export", fill_disk)
        assert "cannot write the model" in error_of(capsys, *arguments)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    assert not list(tmp_path.glob(".unfinished*"))
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
