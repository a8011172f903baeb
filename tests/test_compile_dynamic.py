"""torch.compile with sizes that change: one graph for every option, and no more than torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import randomize
from test_compile import _fresh_compiler  # noqa: F401  (a fixture)
from test_trace import FLAT, OPTIONS, Calling, batch, by_group, instance, random, second
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import truenorm
from truenorm._core import geometry

# every size is another one than any before, so that no two are taken for one
IMAGES = [(3, 5, 7, 9), (4, 5, 8, 11), (6, 5, 10, 12)]
VOLUMES = [(3, 5, 4, 7, 9), (4, 5, 6, 8, 11), (7, 5, 6, 10, 12)]
OTHERS: dict[str, Any] = {
    **{name: OPTIONS[name] for name in ("activation-gelu", "frozen", "channel_axis")},
    **{name: OPTIONS[name] for name in ("skip_nonfinite", "skip_nonfinite-instance")},
    "momentum-None": lambda: batch(momentum=None),
    "on_single-running": lambda: batch(on_single="running"),
    "on_single-skip": lambda: batch(on_single="skip"),
    "renorm": lambda: batch(renorm=True, activation="relu"),
}


def frames(model: Any, inputs: Sequence[tuple[Tensor, ...]], dynamic: bool | None) -> int:
    """Number of graphs; the same bits as without the compiler: outputs, gradients, statistics."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, other = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, dynamic=dynamic, backend=counter)
    for given in inputs:
        found = []
        for run, called in ((eager, eager), (compiled, other)):
            held = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
            y = run(*held)
            at = [*(t for t in held if t.requires_grad), *called.parameters()]
            torch.manual_seed(5)
            grads = torch.autograd.grad(y, at, torch.randn_like(y), allow_unused=True)
            found.append((y, *grads, *(b.clone() for b in called.buffers())))
            strides = y.stride()
        assert strides == found[0][0].stride()
        for one, wanted in zip(*found, strict=True):
            assert (one is None) == (wanted is None)
            assert one is None or torch.equal(one, wanted)
    return int(counter.frame_count)


def torchs(shapes: Sequence[Any], dynamic: bool | None, layer: Any) -> int:
    return frames(layer, [(random(shape),) for shape in shapes], dynamic)


@pytest.fixture(scope="module")
def most() -> dict[bool | None, int]:
    """Graphs of torch's own layer for as many shapes, all of whose sizes change."""
    layer = randomize(nn.BatchNorm2d(5))
    return {dynamic: torchs(IMAGES, dynamic, layer) for dynamic in (True, None)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["mask", "elements", "residual"])
@pytest.mark.parametrize("build", [batch, instance, by_group], ids=["batch", "instance", "group"])
def test_a_second_tensor(build: Any, kind: str, layout: str, most: Any) -> None:
    options = {"momentum": None, "track_running_stats": True} if build is not by_group else {}
    model = Calling(build(activation="gelu", **options), kind.replace("elements", "mask"))
    form = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    inputs = [(x.to(memory_format=form), second(x, kind)) for x in map(random, IMAGES)]
    assert frames(model, inputs, True) <= most[True]


@pytest.mark.parametrize("kind", ["mask", "elements"])
def test_masks_of_volumes(kind: str, most: Any) -> None:
    layer = randomize(truenorm.InstanceNorm3d(5, affine=True))
    inputs = [(x, second(x, kind)) for x in map(random, VOLUMES)]
    assert frames(Calling(layer, "mask"), inputs, True) <= most[True]


@pytest.mark.parametrize("build", ["BatchNorm1d", "InstanceNorm1d", "GroupNorm"])
def test_lengths(build: str, most: Any) -> None:
    args = (1, 5) if build == "GroupNorm" else (5,)
    model = Calling(randomize(getattr(truenorm, build)(*args)), "lengths")
    inputs = [(x, second(x, "lengths")) for x in map(random, FLAT)]
    assert frames(model, inputs, True) <= most[True]
    # one batch, lengths that change: what masks are for
    x = random(FLAT[0])
    assert frames(model, [(x, second(x, "lengths")) for _ in range(4)], None) == 1


@pytest.mark.parametrize("kind", ["rows", "elements"])
@pytest.mark.parametrize("build", [truenorm.LayerNorm, truenorm.RMSNorm])
def test_masks_of_rows(build: Any, kind: str, most: Any) -> None:
    inputs = [(x, second(x, kind)) for x in map(random, [(3, 5, 9), (6, 4, 9), (8, 7, 9)])]
    assert frames(Calling(randomize(build(9)), "mask"), inputs, True) <= most[True]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", OTHERS)
def test_options(option: str, training: bool, most: Any) -> None:
    shapes = [(3, 7, 5, 9), (4, 8, 6, 9), (5, 10, 11, 9)] if option == "channel_axis" else IMAGES
    inputs = [(random(shape),) for shape in shapes]
    assert frames(OTHERS[option]().train(training), inputs, True) <= most[True]


def test_ghost_batches() -> None:
    """One graph for each number of batches, whatever the maps."""
    shapes = [(4, 5, 7, 9), (4, 5, 8, 11), (4, 5, 10, 12), (6, 5, 10, 12)]
    inputs = [(random(shape),) for shape in shapes]
    assert frames(batch(virtual_batch_size=2), inputs[:3], None) == 2
    frames(batch(virtual_batch_size=2), inputs, True)


def test_sizes_found_to_change_on_the_way(most: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.then = batch(activation="relu"), instance()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.first(x, mask=mask)[..., ::2]
            return self.then(y, mask=mask[..., ::2])  # type: ignore[no-any-return]

    inputs = [(x, second(x, "mask")) for x in map(random, IMAGES)]
    for x, mask in inputs:
        mask[..., :4] = True
        assert mask[..., ::2].any(), x
    assert frames(Net(), inputs, None) <= most[None]


def test_the_order_of_dimensions_is_what_sorting_gives() -> None:
    for perm in itertools.permutations(range(4)):
        for shape in itertools.product((1, 2, 3), repeat=4):
            x = torch.empty([shape[p] for p in perm]).permute([perm.index(d) for d in range(4)])
            dims = sorted(range(4), key=lambda d, x=x: (x.stride(d), x.shape[d]))
            found = geometry.inside_out(x.shape, x.stride())
            assert [(x.stride(d), x.shape[d]) for d in found] == [
                (x.stride(d), x.shape[d]) for d in dims
            ]
