"""Directions of import (docs/index.md): ops and tnss know nothing above them. Tier T0."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# package -> the packages of this repository that it may import
ALLOWED = {
    "tnss": {"tnss"},
    "tnl.ops": {"tnl.ops"},
    "tnl.slopes": set(),
    "tnl.models": {"tnl.models", "tnl.ops", "tnl.slopes", "tnss"},
    "tnl.training": {"tnl.training", "tnl.models", "tnl.ops"},
    "tnl.serving": {"tnl.serving", "tnl.models", "tnl.ops", "tnl.slopes"},
    "tnl.integrations": {"tnl.integrations", "tnl.models", "tnl.ops"},
    "tnl.compression": {"tnl.compression", "tnl.training", "tnl.models", "tnl.ops", "tnss"},
    "tnl.cli": {"tnl", "tnss"},
    "tnl.__main__": {"tnl.cli"},
    "tnl": {"tnl.ops"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if belongs_to(name, "tnl") or belongs_to(name, "tnss")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    package = max((name for name in ALLOWED if belongs_to(module, name)), key=len)
    for name in imported_modules(path):
        allowed = any(belongs_to(name, permitted) for permitted in ALLOWED[package])
        assert allowed, f"{module} imports {name}; {package} may import {sorted(ALLOWED[package])}"


def test_imports_are_cheap() -> None:
    """A fresh process that imports the packages and the commands loads neither Triton nor transformers."""
    code = "import sys, tnl, tnl.cli, tnss; print([m for m in ('triton', 'transformers', 'vllm') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
