"""Statistics over several processes equal those of one process on the whole batch."""

from __future__ import annotations

import pytest
import ranks
import torch
from cases import LAYOUTS, Result, exact, randomize
from processes import processes
from tolerances import assert_gradient, assert_output

import truenorm
from truenorm import reference

# how many samples each rank has
CUTS = {
    2: ([3, 3], [1, 4], [0, 5]),
    3: ([2, 2, 2], [4, 0, 1]),
    4: ([1, 2, 0, 3],),
    8: ([1, 1, 0, 2, 1, 3, 0, 1],),
}
EVERY_CUT = [
    pytest.param(cut, id="-".join(map(str, cut))) for cuts in CUTS.values() for cut in cuts
]


def whole(results: list[Result], dim: int = 0) -> Result:
    """The ranks' outputs side by side, and their shares of the parameters' gradients added."""
    added = [
        None if p[0] is None else sum(g.double() for g in p).to(p[0].dtype)
        for p in ([r.weight for r in results], [r.bias for r in results])
    ]
    return Result(
        torch.cat([r.output for r in results], dim),
        torch.cat([r.input for r in results], dim),
        *added,
    )


def check(got: Result, wanted: Result) -> None:
    assert_output(got.output, wanted.output)
    assert_gradient(got.input, wanted.input)
    for name in ("weight", "bias"):
        actual, gradient = getattr(got, name), getattr(wanted, name)
        assert (actual is None) == (gradient is None)
        if actual is not None:
            assert_gradient(actual, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", EVERY_CUT)
def test_sync_batch_norm(sizes: list[int], layout: str, dtype: torch.dtype) -> None:
    layer = randomize(truenorm.SyncBatchNorm(5))
    x = (torch.randn(sum(sizes), 5, 7, 3) * 1.7 + 3.0).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    mean, var = reference.running_update(layer.running_mean, layer.running_var, x, 0.1)
    parts = list(zip(ranks.cut(x, sizes), ranks.cut(grad, sizes), strict=True))
    spec = "SyncBatchNorm", (5,), {}, layer.state_dict(), layout
    found = processes(len(sizes)).run(ranks.step, *spec, each=parts)
    if dtype == torch.float64:
        layer = layer.double()
    check(whole([result for result, _ in found]), exact(layer, x, grad))
    for _, state in found:
        assert torch.equal(state["running_mean"], found[0][1]["running_mean"])
        assert torch.equal(state["running_var"], found[0][1]["running_var"])
        assert state["num_batches_tracked"].item() == 1
    assert_output(found[0][1]["running_mean"], mean)
    assert_output(found[0][1]["running_var"], var)
