"""Layers on DTensors give what they give for the whole tensor on one process."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
from processes import Failed, processes

AFFINE = {"affine": True, "track_running_stats": True}
# none of the sizes is a multiple of the processes' number: parts are uneven, some empty
LAYERS: dict[str, list[Any]] = {
    "batch": [
        ("BatchNorm1d", (6,), {}, (5, 6, 7)),
        ("BatchNorm2d", (5,), {"momentum": None, "activation": "relu"}, (3, 5, 3, 4)),
        ("SyncBatchNorm", (5,), {}, (3, 5)),
    ],
    "policies": [
        ("BatchNorm1d", (5,), {"skip_nonfinite": True}, (5, 5, 3)),
        ("BatchNorm1d", (5,), {"virtual_batch_size": 2}, (5, 5, 3)),
        ("BatchNorm1d", (6,), {"channel_axis": -1}, (5, 3, 6)),
    ],
    "group": [
        ("GroupNorm", (2, 6), {}, (5, 6, 3)),
        ("GroupNorm", (4, 8), {"activation": "gelu"}, (3, 8, 3)),
        ("GroupNorm", (3, 6), {"process_group": "world"}, (3, 6, 5)),
    ],
    "instance": [
        ("InstanceNorm1d", (5,), {}, (3, 5, 3)),
        ("InstanceNorm2d", (5,), {**AFFINE, "activation": "silu"}, (3, 5, 2, 3)),
    ],
    "rows": [
        ("LayerNorm", (7,), {"activation": "gelu"}, (5, 3, 7)),
        ("LayerNorm", ((3, 7),), {"bias": False}, (5, 3, 7)),
        ("RMSNorm", (7,), {}, (3, 1, 7)),
    ],
}
MODES = (True, False)
HELD = ("dtensors", "plain")


def run(sizes: tuple[int, ...], *args: Any) -> int:
    ranks = 1
    for size in sizes:
        ranks *= size
    found = processes(ranks).run(sharded.unsharded, sizes, *args)
    assert len(set(found)) == 1
    return int(found[0])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_over_two_processes(name: str, residual: bool) -> None:
    for layer in LAYERS[name]:
        codes = [code for code in "R01P2" if not code.isdigit() or int(code) < len(layer[3])]
        assert run((2,), [layer], codes, MODES, HELD, residual) == 4 * len(codes)


@pytest.mark.parametrize("name", LAYERS)
def test_over_four_processes(name: str) -> None:
    for layer in LAYERS[name]:
        codes = [code for code in "012" if int(code) < len(layer[3])]
        assert run((4,), [layer], codes, MODES, HELD, True) == 4 * len(codes)


@pytest.mark.parametrize("name", ["batch", "instance", "rows"])
def test_over_a_mesh_of_two_dimensions(name: str) -> None:
    for layer in LAYERS[name][:2]:
        assert run((2, 2), [layer], ["00", "01", "10", "R1"], MODES, HELD[:1], False) == 8


def test_local_response_norm() -> None:
    layer = ("LocalResponseNorm", (3,), {}, (5, 6, 7))
    assert run((2,), [layer], ["R", "0", "1", "2", "P"], MODES[:1], HELD[:1]) == 5


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_lengths(name: str) -> None:
    kwargs = AFFINE if name == "InstanceNorm1d" else {}
    layer = (name, (3,), kwargs, (3, 3, 6))
    calls = {"lengths": sharded.LENGTHS}
    assert run((2,), [layer], ["R", "0", "2"], MODES, HELD, False, "", calls) == 12


@pytest.mark.parametrize("index", range(3))
def test_compiled(index: int) -> None:
    layer = (LAYERS["rows"][0], LAYERS["batch"][0], LAYERS["instance"][1])[index]
    assert run((2,), [layer], ["0"], MODES, HELD[:1], False, "aot_eager") == 2


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_sequence_parallel(ranks: int, dim: int) -> None:
    processes(ranks).run(sharded.in_parallel, dim)


def test_what_does_not_fit_is_refused_in_words() -> None:
    for text in processes(2).run(sharded.refused):
        assert "`input` is a plain Tensor" in text[0]
        assert "distribute both over one mesh" in text[1]
    assert not isinstance(text, Failed)
