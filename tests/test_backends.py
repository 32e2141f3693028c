"""Which implementation runs is decided within a compiled graph (tier T0)."""

import subprocess
import sys

CODE = """
import torch
from tnl.ops.backends import triton_installed

compiled = torch.compile(lambda x: x + 1 if triton_installed() else x - 1, fullgraph=True, backend="eager")
compiled(torch.zeros(()))
"""


def test_looking_for_triton_breaks_no_graph() -> None:
    """In a fresh process: where it was looked up before, nothing is left to break."""
    subprocess.run([sys.executable, "-c", CODE], check=True)
