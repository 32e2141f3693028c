"""What a Hopper GPU would run, compiled without one, in a process of its own without Triton's interpreter."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

DESCRIBED = ("Q", "K", "V", "DO", "Q_PART", "K_PART", "DO_PART")
TYPES = {"scale": "fp32", "CU_SEQLENS": "*i32", "ROWS": "*i64", "SECOND_ROWS": "*i64", "FLAGS": "*i32", "ORDER": "*i32"}
OUTPUTS = ("OUT", "DQ", "DK", "DV")


class Compiled(NamedTuple):
    """Bytes of shared memory, number of products asked of the tensor cores, bytes that a thread's registers spill."""

    shared: int
    products: int
    spilled: int


def compile_for_hopper(kernel: str, warps: int, values: dict[str, Any]) -> Compiled:
    """A kernel in Gluon for bfloat16, as ``module:attribute`` (or what a function of that name returns)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.hopper", json.dumps([kernel, warps, values])],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return Compiled(*map(int, run.stdout.split()))


def _compile(kernel: Any, warps: int, values: dict[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[index,] = "constexpr", values[name]
        elif name in DESCRIBED:
            columns = name.endswith("PART") or (name == "V" and "BLOCK_E" not in values)
            dimensions = [1, 1, 1] if values["PACKED"] else [1, 1]
            block = [*dimensions, values["BLOCK_T"], values["BLOCK_C" if columns else "BLOCK_D"]]
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[name] = f"tensordesc<bf16{block},{layout!r}>"
        else:
            pointer = "*bf16" if name in OUTPUTS else "*fp32"
            signature[name] = TYPES.get(name, pointer if name.isupper() and len(name) > 1 else "i32")
            if signature[name].startswith("*"):
                attributes[index,] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (spilled,) = re.findall(r"STACK:(\d+)", usage)
    return Compiled(compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"), int(spilled))


if __name__ == "__main__":
    named, of_warps, of_values = json.loads(sys.argv[1])
    module, attribute = named.split(":")
    found = getattr(importlib.import_module(module), attribute)
    print(*_compile(found if hasattr(found, "params") else found(), of_warps, of_values))
