"""`truenorm verify`: the promises hold, and the verifier fails where they do not."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from truenorm import functional
from truenorm._core import eager
from truenorm._core.call import Call
from truenorm._tools.extras import CommandError
from truenorm._tools.verify import add_parser, differs
from truenorm._tools.verify.cases import LAYERS, SPECS, in_layout, layouts_of
from truenorm._tools.verify.command import measure
from truenorm._tools.verify.measure import last_places, output_error
from truenorm._tools.verify.sections import Options
from truenorm.nn import _base

PAGE = Path(__file__).resolve().parent.parent / "docs" / "where-torch-differs.md"


def verify(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["verify", *arguments])
    status: int = args.func(args)
    return status


def test_no_promise_is_broken() -> None:
    checks = measure(Options(quick=True), show=False)
    assert [str(c) for c in checks if not c.passed] == []
    assert {c.spec.layer for c in checks} == set(LAYERS)
    assert {c.dtype for c in checks} == {"float32", "bfloat16", "float16", "float64"}
    for spec in SPECS:
        mine = [c for c in checks if c.spec == spec]
        assert {c.layout for c in mine if c.section == "offset"} >= set(layouts_of(spec))
        assert {"input gradient", "output"} <= {c.what for c in mine}


def _slightly_off(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-5)


def _one_pass(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer_norm(call: Call) -> Tensor:
        x, weight, bias, form = call[:4]
        assert weight is not None
        assert bias is not None
        v = x.double()
        mean = v.mean(-1, keepdim=True)
        var = (v * v).mean(-1, keepdim=True) - mean * mean
        y = (v - mean) / (var.clamp(min=0) + form.eps).sqrt() * weight + bias
        return y.to(x.dtype)

    return layer_norm


def _wrong_gradient(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        y = original(*args, **kwargs)
        if y.requires_grad:
            # bfloat16 would round a smaller error away
            y.register_hook(lambda grad: grad * 1.02)
        return y

    return wrapped


def _batch_dependent(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # one unit in the last place, and only in a batch
    def wrapped(call: Call) -> Tensor:
        x, y = call.x, original(call)
        return y * (1 + 2**-23) if x.shape[0] > 1 and x.dtype == torch.float32 else y

    return wrapped


def _nan_leaks(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda call: original(call) + call.x.sum() * 0.0


@pytest.mark.parametrize(
    ("layer", "breakage", "section"),
    [
        ("LayerNorm", _slightly_off, "offset"),
        ("LayerNorm", _one_pass, "offset"),
        ("LayerNorm", _nan_leaks, "bits"),
        ("RMSNorm", _batch_dependent, "bits"),
        ("GroupNorm", _wrong_gradient, "gradient float32"),
        ("InstanceNorm2d", _slightly_off, "scale"),
        ("LocalResponseNorm", _slightly_off, "gradient scale"),
        ("SyncBatchNorm", _wrong_gradient, "gradient dtypes"),
    ],
)
def test_a_broken_layer_is_found(
    layer: str,
    breakage: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
    section: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name = _base, "normalize"
    if layer == "LocalResponseNorm":
        module, name = functional, "local_response_norm"
    monkeypatch.setattr(module, name, breakage(getattr(module, name)))
    # the layers then go through what is broken
    monkeypatch.setattr(eager, "call", lambda *_: None)
    report = tmp_path / "report.json"
    assert verify("--quick", "--layer", layer, "--json", str(report)) == 1
    assert "FAIL" in capsys.readouterr().out
    failed = [c for c in json.loads(report.read_text())["checks"] if not c["passed"]]
    assert {c["layer"] for c in failed} == {layer}
    assert section in {c["section"] for c in failed}


def test_json_and_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    arguments = ("--quick", "--layer", "RMSNorm", "GroupNorm", "--dtype", "float32", "bfloat16")
    assert verify(*arguments, "--json", str(report)) == 0
    contents = json.loads(report.read_text())
    checks, counts = contents["checks"], contents["summary"]
    assert counts["checks"] == len(checks)
    assert counts["failed"] == 0
    assert counts["torch_failed"] == sum(not c["torch_passed"] for c in checks)
    assert contents["torch"] == str(torch.__version__)
    assert {c["layer"] for c in checks} == {"RMSNorm", "GroupNorm"}
    assert {c["dtype"] for c in checks} == {"float32", "bfloat16"}
    offsets = {c["condition"] for c in checks if c["section"] == "offset"}
    assert offsets == {"0", "1e2", "1e4", "1e6"}
    out = capsys.readouterr().out
    assert f"{len(checks)} checks, 0 failed" in out
    assert "channels_last" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "BatchNorm"], "invalid choice: 'BatchNorm'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--write", "page.md"], "add --against-torch"),
        (["--against-torch", "--quick"], "leave out --layer, --dtype, --quick"),
        (["--against-torch", "--write", "no/page.md"], "no/page.md"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        verify(*arguments)
    assert message in capsys.readouterr().err


def test_a_file_is_not_replaced_unforced(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("mine")
    arguments = ("--quick", "--layer", "RMSNorm", "--dtype", "float32", "--json")
    with pytest.raises(CommandError, match=r"--json \(='.*report.json'\) exists: .* add --force"):
        verify(*arguments, str(path))
    assert path.read_text() == "mine"
    assert verify(*arguments, str(path), "--force") == 0
    assert json.loads(path.read_text())["summary"]["failed"] == 0
    with pytest.raises(CommandError, match="no/such' does not exist, make it first"):
        verify(*arguments, "no/such/report.json")


def test_write_needs_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no table here\n")
    with pytest.raises(SystemExit, match="2"):
        verify("--against-torch", "--write", str(page))
    assert "table:begin" in capsys.readouterr().err
    assert page.read_text() == "no table here\n"


def test_against_torch_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{differs.BEGIN}\nold\n{differs.END}\nafter\n")
    assert verify("--against-torch", "--write", str(page)) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{differs.BEGIN}\n| case |")
    assert text.endswith(f"{differs.END}\nafter\n")
    assert "old" not in text
    # the page in docs/ lists the same cases, and has a heading for each group of them
    cases = listed(text)
    assert cases == listed(PAGE.read_text(encoding="utf-8"))
    headings = {line[3:] for line in PAGE.read_text().splitlines() if line.startswith("## ")}
    assert {section for section, *_ in differs._cases()} == headings


def listed(page: str) -> list[str]:
    return [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]


def test_a_difference_that_is_none() -> None:
    right = differs.Difference("A", "case", "std", 1e-7, 2e-7, 2e-6)
    wrong = differs.Difference("A", "other", "std", 1e-7, math.inf, 2e-6)
    refused = differs.Difference("A", "third", "std", 1e-7, None, 2e-6)
    rows = differs.markdown([right, wrong, refused]).splitlines()[2:]
    assert "2e-7: right" in rows[0]
    assert "| inf |" in rows[1]
    assert "not supported" in rows[2]


def test_layouts_hold_the_same_values() -> None:
    x = torch.randn(3, 4, 5, 6)
    for layout in ("contiguous", "channels_last", "transposed", "permuted", "sliced", "unaligned"):
        y = in_layout(x, layout)
        assert torch.equal(x, y)
        assert (y.stride() == x.stride()) == (layout in ("contiguous", "unaligned"))
    assert in_layout(x, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert in_layout(x, "expanded").stride(0) == 0


def test_errors_are_measured() -> None:
    exact = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert output_error(exact.float(), exact) == 0.0
    assert output_error(exact.float() * 1.5, exact) == pytest.approx(0.5)
    assert output_error(torch.tensor([1.0, -1.0, math.nan, -1.0]), exact) == math.inf
    # the next bfloat16 after 1 is one unit in the last place away
    step = torch.tensor([1.0 + 2**-7, -1.0, 1.0, -1.0]).bfloat16()
    assert last_places(step, exact) == 1.0
