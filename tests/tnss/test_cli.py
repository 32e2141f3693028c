"""The command line, in process. Tier T0."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import safetensors.numpy

from tests.tnss.planted import A6A, planted_ring
from tnss.cli import main, read_tensor

QUICK = ["--max-rank", "4", "--restarts", "2", "--evaluations", "4"]


@pytest.fixture
def tensor_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "tensor.npy", planted_ring(*A6A).numpy())
    return tmp_path / "tensor.npy"


def test_search_show_reconstruct(tensor_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["search", str(tensor_file), "--ring", *QUICK, "--output", str(out), "--cache", str(tmp_path / "c.db")]
    assert main(arguments) == 0
    assert json.loads((out / "result.json").read_text())["parameters"] == 126
    assert main(["show", str(out)]) == 0
    assert "126" in capsys.readouterr().out
    assert main(["reconstruct", str(out), str(tmp_path / "back.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "back.npy"), planted_ring(*A6A).numpy(), atol=1e-5)


def test_image_to_image(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.linspace(0, 1, 16), np.linspace(0, 1, 16))
    matplotlib.image.imsave(tmp_path / "in.png", np.stack([x * y] * 3, axis=-1))
    out = str(tmp_path / "out")
    shape = ["--shape", "4,4,4,4"]
    assert main(["search", str(tmp_path / "in.png"), *shape, "--train", "--rse", "1e-3", *QUICK, "--output", out]) == 0
    assert main(["reconstruct", out, str(tmp_path / "back.png"), "--shape", "16,16"]) == 0
    difference = matplotlib.image.imread(tmp_path / "back.png")[:, :, 0] - x * y
    assert np.abs(difference).max() < 0.1


def test_compare(tensor_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    assert main(["compare", str(tensor_file), *QUICK, "--methods", "auto,greedy", "--output", str(out)]) == 0
    lines = (out / "compare.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["method", "auto", "greedy"]
    assert (out / "compare.png").stat().st_size > 1000


def test_read_tensor_formats(tmp_path: Path) -> None:
    first, second = np.ones((2, 2, 2), np.float32), np.zeros((3, 3), np.float32)
    np.savez(tmp_path / "both.npz", first=first, second=second)
    safetensors.numpy.save_file({"first": first, "second": second}, tmp_path / "both.safetensors")
    for suffix in ("npz", "safetensors"):
        np.testing.assert_array_equal(read_tensor(f"{tmp_path}/both.{suffix}"), first)  # the only one of order 3
        np.testing.assert_array_equal(read_tensor(f"{tmp_path}/both.{suffix}:second"), second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "missing.npy"], "file: cannot read 'missing.npy'"),
        (["search", "tensor.txt"], "file: expected .npy, .npz, .png or .safetensors"),
        (["search", "{folder}/broken.npz"], "file: cannot read"),
        (["search", "{folder}/broken.png"], "file: cannot read"),
        (["search", "{folder}/broken.safetensors"], "file: cannot read"),
        (["search", "{folder}/two.npz"], "file: cannot read"),
        (["search", "{folder}/two.npz:three"], "expected one of the arrays"),
        (["search", "{folder}/tensor.npy", "--max-rank", "0"], "max_rank: expected at least 1"),
        (["search", "{folder}/tensor.npy", "--shape", "5,5,5"], "--shape: expected"),
        (["search", "{folder}/tensor.npy", "--max-degree", "2"], "--max-degree: expected"),
        (["search", "{folder}/tensor.npy", "--lagrangian", "-1"], "weight: expected"),
        (["search", "{folder}/tensor.npy", "--parameters", "5"], "objective: expected"),
        (["search", "{folder}/tensor.npy", "--device", "abacus"], "device: expected"),
        (["search", "{folder}/tensor.npy", "--output", "{folder}/tensor.npy"], "--output: expected a folder"),
        (["compare", "{folder}/tensor.npy", "--methods", "auto,magic"], "--methods: expected"),
        (["show", "{folder}"], "folder: expected a result folder"),
        (["reconstruct", "{folder}", "x.npy"], "path: expected a network"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, tensor_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tensor_file.parent
    for name in ("broken.npz", "broken.png", "broken.safetensors"):
        (folder / name).write_bytes(b"not what the suffix says")
    np.savez(folder / "two.npz", a=np.ones((2, 2, 2)), b=np.ones((2, 2, 2)))
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(error) == 1
    assert error[0].startswith("tnss: ")
    assert message in error[0]


@pytest.mark.parametrize("command", [[], ["search"], ["show"], ["reconstruct"], ["compare"]], ids=str)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out
