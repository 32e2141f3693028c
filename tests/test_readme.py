"""What README and site show works: Python examples run, commands parse, links lead somewhere. Tier T0."""

import re
import shlex
from pathlib import Path

import pytest

import tnl.cli
import tnss.cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "operator.md"]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command line of the README, split into words; comments are dropped."""
    lines = [line for block in code_blocks(README, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EXAMPLES = [(page.name, code) for page in PAGES for code in code_blocks(page.read_text(), "python")]


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_python_examples(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write files
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
        case "pip":
            assert (ROOT / "constraints.txt").is_file()
        case other:
            pytest.fail(f"no check for a command that begins with {other}")


def test_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands() if words[0] == "tnl"}
    assert shown == set(tnl.cli.COMMANDS)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:docs|tests|benchmarks|configs|src)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
