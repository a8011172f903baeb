"""The command `truenorm`: each of its commands, and what it says to bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import truenorm
from truenorm._tools import extras
from truenorm._tools.cli import main
from truenorm._tools.explain import command as explain_command


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info(capsys) -> None:
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    assert out == f"{truenorm.info()}\n"


def test_version_and_help(capsys) -> None:
    assert run(capsys, "--version")[:2] == (0, f"truenorm {truenorm.__version__}\n")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in ("explain", "verify", "bench", "demo", "info"):
        assert name in out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "truenorm", "bench", "--family", "none"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("truenorm: argument --family: invalid choice: 'none'")
    assert done.stderr.endswith("(see truenorm bench --help)\n")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("InstanceNorm1d", "2 3 5"),
        ("InstanceNorm2d", "1 3 2 2"),
        ("BatchNorm1d", "128 3 512"),
        ("BatchNorm2d", "2 3 5 6"),
        ("LazyInstanceNorm3d", "2 3 2 2 2"),
        ("SyncBatchNorm", "2 3"),
        ("GroupNorm", "2 6 4"),
        ("LayerNorm", "2 3 4"),
        ("RMSNorm", "6"),
        ("LocalResponseNorm", "2 5 3"),
    ],
)
def test_explain_is_the_function(capsys, layer: str, shape: str) -> None:
    status, out, err = run(capsys, "explain", layer, *shape.split(), "--seed", "3")
    assert (status, err) == (0, "")
    sizes = tuple(map(int, shape.split()))
    arguments = {
        "GroupNorm": (2, 6),
        "LayerNorm": (4,),
        "RMSNorm": (6,),
        "LocalResponseNorm": (3,),
    }
    built = () if layer.startswith("Lazy") else arguments.get(layer, sizes[1:2])
    assert out == f"{truenorm.explain(getattr(torch.nn, layer)(*built), sizes, seed=3)}\n"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", ["BatchNorm1d", "LazyBatchNorm1d", "InstanceNorm1d", "RMSNorm"])
def test_explain_dtypes(capsys, layer: str, dtype: str) -> None:
    status, out, err = run(capsys, "explain", layer, "2", "3", "4", "--dtype", dtype)
    assert (status, err) == (0, "")
    assert f"shape (2, 3, 4), {dtype}" in " ".join(out.split())


def test_explain_options(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "group.png"
    status, out, _ = run(
        capsys, "explain", "groupnorm", "(2,", "6,", "4)", "--num-groups", "3", "--eps", "0.1",
        "--picture", str(picture),
    )  # fmt: skip
    assert status == 0
    assert "GroupNorm(3, 6, eps=0.1" in out
    assert "2 samples × 3 groups = 6 groups; each has 2×4 = 8 values." in out
    assert out.endswith(f"picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    _, out, _ = run(capsys, "explain", "LayerNorm", "2x3x4", "--normalized-shape", "3", "4")
    assert "each block of 3×4 values is normalized alone" in out
    _, out, _ = run(capsys, "explain", "LocalResponseNorm", "2", "6", "4", "--size", "5")
    assert "channel 3: channels 1–5" in out


def test_verify(capsys) -> None:
    status, out, err = run(capsys, "verify", "--quick", "--layer", "RMSNorm", "--dtype", "float32")
    assert (status, err) == (0, "")
    assert "RMSNorm" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: command"),
        ("normalize", "invalid choice: 'normalize'"),
        ("explain", "required: layer, shape (see truenorm explain --help)"),
        ("explain InstanceNorm 2 3 5", "`layer` (='InstanceNorm') is unknown: did you mean Inst"),
        ("explain BachNorm2d 2 3 5 6", "did you mean BatchNorm2d?"),
        ("explain Dropout 2 3 5", "`layer` (='Dropout') is unknown: choose from BatchNorm1d"),
        ("explain BatchNorm1d 2 0 5", "`shape` (='2 0 5') must be positive whole numbers"),
        ("explain BatchNorm1d two 3", "`shape` (='two 3') must be positive whole numbers"),
        ("explain BatchNorm1d 40000 30000", "1,200,000,000 values"),
        ("explain GroupNorm 5", "`shape` (=5) has one dimension, but GroupNorm takes at least two"),
        ("explain BatchNorm2d 2 3 5", "expected 4D input (got 3D input)"),
        ("explain BatchNorm1d 1 3", "Expected more than 1 value per channel"),
        ("explain InstanceNorm1d 2 3 1", "Expected more than 1 spatial element"),
        ("explain GroupNorm 2 6 4 --num-groups 4", "(6) must be divisible by num_groups (4)"),
        ("explain BatchNorm1d 4 3 --num-groups 2", "--num-groups (=2) is of GroupNorm: leave it"),
        ("explain LayerNorm 2 3 --normalized-shape 5", "normalized_shape must equal"),
        ("explain LayerNorm 2 3 --size 5", "--size (=5) is of LocalResponseNorm"),
        ("explain LocalResponseNorm 2 3 4 --size 0", "`size` (=0)"),
        ("explain LocalResponseNorm 2 3 4 --eps 1", "LocalResponseNorm has none"),
        ("explain RMSNorm 4 --eps -1", "must be non-negative, but got -1.0"),
        ("explain RMSNorm 4 --dtype int8", "--dtype (='int8') is unknown: choose from float32"),
        ("explain RMSNorm 4 --seed x", "argument --seed: invalid int value: 'x'"),
        ("explain RMSNorm 4 --picture x.jpg", "--picture (='x.jpg') must be a PNG"),
        ("explain RMSNorm 4 --picture no/where/x.png", "no/where' does not exist, make it first"),
        ("verify --layer Dropout", "invalid choice: 'Dropout'"),
        ("demo --epochs 5", "unrecognized arguments: --epochs 5"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv: str, message: str) -> None:
    status, out, err = run(capsys, *argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("truenorm: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("argv", "missing", "message"),
    [
        (
            ["explain", "RMSNorm", "4", "--picture", "x.png"],
            "matplotlib",
            "a picture needs matplot",
        ),
        (["demo"], "sklearn", "truenorm demo needs scikit-learn"),
        (["demo"], "PIL", "truenorm demo needs pillow"),
    ],
)
def test_missing_package_names_the_extra(
    capsys, monkeypatch, tmp_path, argv: list[str], missing: str, message: str
) -> None:
    monkeypatch.setattr(extras, "has", lambda package: package != missing)
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert err.endswith('pip install "truenorm[demo]"\n')
    assert not list(tmp_path.iterdir())


def test_interruption_ends_without_a_traceback(capsys, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain_command, "explain", interrupted)
    assert run(capsys, "explain", "RMSNorm", "4") == (130, "", "truenorm: interrupted\n")


def test_commands_need_no_optional_package_to_be_listed(capsys, monkeypatch) -> None:
    for package in ("matplotlib", "rich", "sklearn", "PIL"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run(capsys, "demo", "--help")[0] == 0
    assert run(capsys, "explain", "RMSNorm", "4")[0] == 0
