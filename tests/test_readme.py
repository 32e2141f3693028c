"""What README and site show works: Python examples run, commands parse, links lead somewhere. Tier T0."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

import tnl.cli
import tnss.cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").glob("*.md"))
RUN = [README, ROOT / "docs" / "operator.md"]  # whose Python examples need no files of the reader's
CHECKED = ("tnl", "tnss", "torchrun", "make", "python")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's shell blocks, split into words; comments are dropped, pipes are cut."""
    blocks = (block.replace("\\\n", " ") for block in code_blocks(page.read_text(), "(?:bash|console)"))
    typed = (line.removeprefix("$ ") for block in blocks for line in block.splitlines())
    lines = (shlex.split(line, comments=True) for line in typed)
    return [list(words) for line in lines for pipe, words in itertools.groupby(line, lambda word: word != "|") if pipe]


EXAMPLES = [(page.name, code) for page in RUN for code in code_blocks(page.read_text(), "python")]


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_python_examples(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write files
    exec(compile(code, page, "exec"), {"__name__": "example"})


COMMANDS = [(page.name, words) for page in [README, *SITE] for words in commands(page) if words[0] in CHECKED]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_commands(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    match words[0]:
        case "tnl":
            assert tnl.cli.parse(words[1:])[0] == words[1]
        case "tnss":
            tnss.cli._parser().parse_args(words[1:])  # ends the process where it cannot parse
        case "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "python":
            assert importlib.util.find_spec(words[words.index("-m") + 1])


def test_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands(README) if words[0] == "tnl"}
    assert shown == set(tnl.cli.COMMANDS)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *SITE], ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:docs|tests|benchmarks|configs|src)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
