"""Statistics over several processes equal those of one process on the whole batch."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
import ranks
import torch
from cases import LAYOUTS, Result, exact, randomize
from processes import Processes, processes
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


def test_the_second_derivative() -> None:
    sizes = [2, 0, 3]
    layer = randomize(truenorm.SyncBatchNorm(4)).double()
    x, grad, along_x = (torch.randn(5, 4, 3).double() for _ in range(3))
    along = [along_x, torch.randn(4).double(), torch.randn(4).double()]
    # one process, by the same layer's own path, which test_autograd.py holds against differences
    x_all, grad_all = (t.clone().requires_grad_() for t in (x, grad))
    first = torch.autograd.grad(
        layer(x_all), [x_all, *layer.parameters()], grad_all, create_graph=True
    )
    total = sum((a * b).sum() for a, b in zip(along, first, strict=True))
    wanted = torch.autograd.grad(total, [x_all, layer.weight, grad_all])
    state = randomize(truenorm.SyncBatchNorm(4)).state_dict()
    state |= {k: v.detach() for k, v in layer.named_parameters()}
    parts = zip(ranks.cut(x, sizes), ranks.cut(grad, sizes), strict=True)
    spec = "SyncBatchNorm", (4,), {"dtype": torch.float64}, state
    found = processes(3).run(
        ranks.second_order, *spec, [list(along_x.split(sizes)), *along[1:]], each=list(parts)
    )
    assert_gradient(torch.cat([f[0] for f in found]), wanted[0])
    assert_gradient(sum(f[1] for f in found), wanted[1])
    assert_gradient(torch.cat([f[2] for f in found]), wanted[2])


@pytest.mark.parametrize(("sizes", "backend"), [([3, 2], "inductor"), ([0, 5], "aot_eager")])
def test_compiled(sizes: list[int], backend: str) -> None:
    layer = randomize(truenorm.SyncBatchNorm(5))
    x, grad = torch.randn(5, 5, 7, 3) + 3.0, torch.randn(5, 5, 7, 3)
    parts = list(zip(ranks.cut(x, sizes), ranks.cut(grad, sizes), strict=True))
    spec = "SyncBatchNorm", (5,), {}, layer.state_dict()
    eager = processes(2).run(ranks.step, *spec, each=parts)
    compiled = processes(2).run(ranks.step, *spec, "contiguous", backend, each=parts)
    check(whole([result for result, _ in compiled]), exact(layer, x, grad))
    for (one, state), (other, wanted) in zip(compiled, eager, strict=True):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.input, other.input)
        assert all(torch.equal(v, wanted[k]) for k, v in state.items())


def test_another_channel_count_is_an_error_on_every_rank() -> None:
    found = processes(3).outcomes(ranks.raised, [(2, 5), (2, 5), (2, 7)], [5, 5, 7])
    for failed in found:
        assert failed.kind == "ValueError"
        assert "SyncBatchNorm has other numbers of statistics" in failed.text
        assert "5 on rank 0, 5 on rank 1, 7 on rank 2. Build the model the same" in failed.text


def test_one_value_in_all_processes_is_an_error_on_every_rank() -> None:
    found = processes(3).outcomes(ranks.raised, [(0, 5), (1, 5), (0, 5)], [5, 5, 5])
    for failed in found:
        assert failed.kind == "ValueError"
        assert "more than 1 value per channel when training, over all processes" in failed.text
    # two ranks with one value each are enough, and so are none at all
    processes(3).run(ranks.raised_nothing, [(1, 5), (1, 5), (0, 5)])
    processes(3).run(ranks.raised_nothing, [(0, 5), (0, 5), (0, 5)])


@pytest.mark.parametrize("sizes", [[3, 2], [0, 5], [1, 4]], ids=str)
def test_renorm(sizes: list[int]) -> None:
    layer = randomize(truenorm.BatchNorm1d(5, renorm=True))
    x, grad = torch.randn(5, 5, 7) * 1.7 + 3.0, torch.randn(5, 5, 7)
    parts = list(zip(ranks.cut(x, sizes), ranks.cut(grad, sizes), strict=True))
    spec = "SyncBatchNorm", (5,), {"renorm": True}, layer.state_dict()
    found = processes(2).run(ranks.step, *spec, each=parts)
    alone, state = ranks.step(0, x, grad, "BatchNorm1d", *spec[1:])
    check(whole([result for result, _ in found]), alone)
    for _, after in found:
        assert_output(after["running_mean"], state["running_mean"])
        assert_output(after["running_var"], state["running_var"])


def test_another_number_of_ghost_batches_is_an_error_on_every_rank() -> None:
    """Once all have agreed upon a number, too: a data set's last batch is shorter on some."""
    sizes = [[(6, 5), (6, 5)], [(6, 5), (4, 5)], [(6, 5), (0, 5)]]
    for shapes in sizes:
        found = processes(2).outcomes(ranks.ghosts, shapes)
        if shapes[0] == shapes[1]:
            assert found == [[3, 6], [3, 6]]
            continue
        for failed in found:
            assert failed.kind == "ValueError"
            assert "`virtual_batch_size` cuts the batch into other numbers of" in failed.text
            assert f"3 on rank 0, {max(shapes[1][0] // 2, 1)} on rank 1" in failed.text


@pytest.mark.parametrize("how", ["forward", "backward", "late"])
def test_a_rank_that_does_not_come(how: str) -> None:
    own = Processes(3, datetime.timedelta(seconds=4))
    try:
        own.run(ranks.nothing)
        start = time.monotonic()
        first, gone, last = own.outcomes(ranks.leave, 1, how)
        assert time.monotonic() - start < 40
        if how == "late":
            assert gone is None
        else:
            assert str(gone) == "ended: 9"
        for rank, failed in ((0, first), (2, last)):
            assert failed.kind == "RuntimeError"
            assert f"the exchange of statistics failed on rank {rank} of 3: anot" in failed.text
            assert "within the group's timeout" in failed.text
    finally:
        own.close()


WORLD = {"process_group": "world"}
SPACE = [
    ("InstanceNorm2d", (5,), {"affine": True, "track_running_stats": True}, (2, 5, 9, 3)),
    ("InstanceNorm3d", (3,), {}, (1, 3, 9, 2, 3)),
    ("GroupNorm", (3, 6), {}, (2, 6, 9, 5)),
    ("GroupNorm", (1, 4), {}, (3, 4, 9)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[4, 5], [3, 0, 6], [1, 4, 3, 1]], ids=str)
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), SPACE)
def test_a_sample_cut_over_ranks(
    name: str, args: Any, kwargs: Any, shape: Any, sizes: list[int], layout: str, dtype: torch.dtype
) -> None:
    layer = randomize(getattr(truenorm, name)(*args, **kwargs))
    x = (torch.randn(shape) * 1.7 + 3.0).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    state = layer.state_dict()
    parts = list(zip(ranks.cut(x, sizes, 2), ranks.cut(grad, sizes, 2), strict=True))
    spec = name, args, kwargs | WORLD, {k: v.clone() for k, v in state.items()}, layout
    found = processes(len(sizes)).run(ranks.step, *spec, each=parts)
    if dtype == torch.float64:
        layer = layer.double()
    check(whole([result for result, _ in found], 2), exact(layer, x, grad))
    if "running_mean" in state:
        moved = reference.running_update(
            state["running_mean"], state["running_var"], x, 0.1, per_sample=True
        )
        for _, after in found:
            assert_output(after["running_mean"], moved[0])
            assert_output(after["running_var"], moved[1])
            assert torch.equal(after["running_var"], found[0][1]["running_var"])


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_batch_norm_of_a_group(name: str) -> None:
    layer = randomize(getattr(truenorm, name)(5, momentum=None))
    shape = {"1": (6, 5), "2": (6, 5, 7, 3), "3": (6, 5, 2, 3, 2)}[name[-2]]
    x, grad = torch.randn(shape) + 30.0, torch.randn(shape)
    parts = list(zip(ranks.cut(x, [4, 2]), ranks.cut(grad, [4, 2]), strict=True))
    spec = name, (5,), {"momentum": None} | WORLD, layer.state_dict()
    found = processes(2).run(ranks.step, *spec, each=parts)
    check(whole([result for result, _ in found]), exact(layer, x, grad))
    mean, var = reference.running_update(layer.running_mean, layer.running_var, x, 1.0)
    assert_output(found[1][1]["running_mean"], mean)
    assert_output(found[1][1]["running_var"], var)


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_far_from_zero(layout: str, offset: float) -> None:
    layer = randomize(truenorm.SyncBatchNorm(5))
    x = torch.randn(6, 5, 7, 3) + offset
    grad = torch.randn(x.shape)
    parts = list(zip(ranks.cut(x, [1, 2, 3]), ranks.cut(grad, [1, 2, 3]), strict=True))
    spec = "SyncBatchNorm", (5,), {}, layer.state_dict(), layout
    found = processes(3).run(ranks.step, *spec, each=parts)
    check(whole([result for result, _ in found]), exact(layer, x, grad))


def test_statistics_of_some_ranks() -> None:
    x, grad = torch.randn(8, 5, 3), torch.randn(8, 5, 3)
    layer = randomize(truenorm.SyncBatchNorm(5))
    parts = list(zip(ranks.cut(x, [2] * 4), ranks.cut(grad, [2] * 4), strict=True))
    found = processes(4).run(ranks.step_in_pairs, layer.state_dict(), each=parts)
    for first in (0, 2):
        half = slice(2 * first, 2 * first + 4)
        check(whole(found[first : first + 2]), exact(layer, x[half], grad[half]))


def test_what_a_step_sends() -> None:
    found = processes(2).run(ranks.exchanges)
    assert found[0] == found[1]
    # 2 numbers per statistic and 2 more forward, 2 per statistic backward
    assert found[0] == {
        "batch": [12, 10],
        "instance": [22, 20],
        "group": [14, 12],
        "eval": [],
        "parameters alone": [12],
    }


def test_together() -> None:
    layers = [truenorm.SyncBatchNorm(5), truenorm.BatchNorm1d(3), truenorm.InstanceNorm1d(4)]
    states = [randomize(layer).state_dict() for layer in layers]
    # the last one unbatched
    shapes = [(2, 5, 3), (4, 3), (4, 7)]
    each = [[[torch.randn(s) for s in shapes] for _ in range(2)] for _ in range(3)]
    for (at_once, sizes), (one_by_one, single) in processes(3).run(
        ranks.together, each=[(states, xs, grads) for xs, grads in each]
    ):
        assert len(at_once) == len(one_by_one) == 16
        assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
        assert sizes == [[12 + 8 + 10], [10 + 6 + 8]]
        assert single == [[12, 8, 10], [8, 6, 10]]


def test_together_in_one_process_and_bad_input() -> None:
    together = truenorm.distributed.call_together
    layers = [truenorm.BatchNorm1d(3), truenorm.GroupNorm(1, 4)]
    xs = [torch.randn(4, 3), torch.randn(2, 4)]
    for y, layer, x in zip(together(layers, xs), layers, xs, strict=True):
        assert torch.equal(y, layer(x))
    assert together([], []) == []
    with pytest.raises(TypeError, match="`layers` holds a LayerNorm, whose statistics do not span"):
        together([truenorm.LayerNorm(3)], xs[:1])
    with pytest.raises(
        ValueError, match=r"`inputs` \(=1 of them\) must be as many as `layers` \(=2"
    ):
        together(layers, xs[:1])
    with pytest.raises(ValueError, match="`layers` holds a layer twice"):
        together(layers[:1] * 2, xs[:1] * 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape"),
    [("BatchNorm2d", (5,), {"momentum": None}, (5, 5, 4, 3)), *SPACE],
)
def test_compiled_without_a_break(
    name: str, args: Any, kwargs: Any, shape: Any, layout: str
) -> None:
    layer = randomize(getattr(truenorm, name)(*args, **kwargs))
    x, grad = torch.randn(shape) + 3.0, torch.randn(shape)
    dim = 0 if "Batch" in name else 2
    sizes = [shape[dim] - 2, 2]
    parts = list(zip(ranks.cut(x, sizes, dim), ranks.cut(grad, sizes, dim), strict=True))
    spec = name, args, kwargs | WORLD, layer.state_dict(), layout
    eager = processes(2).run(ranks.step, *spec, each=parts)
    compiled = processes(2).run(ranks.step, *spec, "aot_eager", each=parts)
    check(whole([result for result, _ in compiled], dim), exact(layer, x, grad))
    for (one, state), (other, wanted) in zip(compiled, eager, strict=True):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.input, other.input)
        assert all(torch.equal(v, wanted[k]) for k, v in state.items())


def test_a_rank_that_goes_on_without_its_graph() -> None:
    assert processes(2).run(ranks.eager_on_one_rank) == [True, True]


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [("SyncBatchNorm", (4,), (3, 4, 5)), ("GroupNorm", (2, 4), (2, 4, 6))],
)
def test_nothing_waits_for_the_host(name: str, args: Any, shape: Any) -> None:
    each = [(torch.randn(shape), torch.randn(shape)) for _ in range(2)]
    assert processes(2).run(ranks.step_as_on_a_device, name, args, each=each) == [True, True]
    for failed in processes(2).outcomes(ranks.one_value_on_a_device):
        assert failed.kind == "RuntimeError"
        assert "expected more than 1 value per statistic over all processes" in failed.text
