"""truenorm.tune, by a clock that prefers what a test says: no test looks at a speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case
from checking import check_layer
from on_triton import DEVICE, HAS_CUDA, needs_triton, small_tiles, triton_kernels
from promises import bits, same

import truenorm
from truenorm._triton import config
from truenorm._triton.config import Launch

CASE = Case("LayerNorm", ((40,),), {}, (6, 40))


@pytest.fixture(autouse=True)
def _choices_as_before() -> Iterator[None]:
    before = dict(config.CHOSEN)
    yield
    config.CHOSEN.clear()
    config.CHOSEN.update(before)
    config.CALLS.clear()


def prefers(wanted: Callable[[Launch], float]) -> Callable[[Callable[[], object]], float]:
    """A clock by the choices in force, not by time."""

    def clock(run: Callable[[], object]) -> float:
        return sum(wanted(launch) for launch in config.CHOSEN.values()) + 100.0

    return clock


@needs_triton
def test_the_fastest_is_kept_and_right() -> None:
    from truenorm._triton.tune import tune_layer

    layer, x = CASE.build().to(DEVICE), CASE.input().to(DEVICE)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    clock = prefers(lambda launch: -10.0 if launch.units in (2 * 8, 2 * 32) else 5.0)
    with triton_kernels():
        found = tune_layer(layer, x, clock)
    # one choice forward, one backward, each with more rows to a tile
    assert [(t.key.backward, t.before.units, t.after.units) for t in found] == [
        (False, 8, 16), (True, 32, 64),
    ]  # fmt: skip
    assert all(t.seconds_after < t.seconds_before for t in found)
    assert {t.key: t.after for t in found} == config.CHOSEN
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(p.grad is None for p in layer.parameters())
    with triton_kernels():
        check_layer(layer, x)
        grad = torch.randn(CASE.shape).to(DEVICE)
        assert same(bits(layer, x, grad), bits(layer, x, grad))


@needs_triton
def test_what_is_not_faster_is_left_alone() -> None:
    from truenorm._triton.tune import tune_layer

    layer, x = CASE.build().to(DEVICE), CASE.input().to(DEVICE)
    with small_tiles(), triton_kernels():
        found = tune_layer(layer, x, prefers(lambda launch: 0.0))
    assert len(found) == 2
    assert all(t.before == t.after for t in found)
    assert config.CHOSEN == {}


@needs_triton
def test_a_choice_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from truenorm._triton import tune

    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        config.whole(40, 40, columns=False, grouped=False, width=4, backward=False)
        if config.CHOSEN:
            raise RuntimeError("out of resources: registers")

    found = tune.tune_step(step, lambda run: 1.0)
    assert [t.after for t in found] == [t.before for t in found]
    assert config.CHOSEN == {}
    assert calls > 3


@pytest.mark.skipif(HAS_CUDA, reason="about a machine without a GPU")
def test_only_a_gpu_is_tuned() -> None:
    layer = truenorm.LayerNorm(4)
    with pytest.raises(TypeError, match=r"`input` must be a torch\.Tensor, but got list"):
        truenorm.tune(layer, [1.0])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="`input` is on device cpu, and only CUDA kernels"):
        truenorm.tune(layer, torch.randn(3, 4))
