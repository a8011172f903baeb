"""The host side of the Triton kernels: who serves what, launch choices, what is compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from on_triton import (
    DEVICE,
    HAS_CUDA,
    PRETENDS,
    in_the_interpreter,
    launches,
    needs_triton,
    small_tiles,
    triton_kernels,
)

import truenorm
from truenorm import _triton
from truenorm._core import geometry, operators
from truenorm._core.call import AS_GIVEN, GROUPS, KEEP, UNCENTRED, Form
from truenorm._triton import config
from truenorm.nn import _orders

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- who serves CUDA tensors


@pytest.mark.parametrize(
    ("triton", "cuda", "environment", "reason"),
    [
        ("3.4.0", "13.0", {}, ""),
        ("3.10.1+git123", "13.0", {}, ""),
        ("3.6.0", "13.0", {"TRUENORM_CUDA": "triton", "TRUENORM_BACKEND": "plain"}, ""),
        ("3.6.0", None, {}, "built without CUDA"),
        (None, "13.0", {}, 'not installed: pip install "triton>=3.4"'),
        ("3.3.1", "13.0", {}, "Triton 3.3.1 is too old"),
        ("3.6.0", "13.0", {"TRUENORM_CUDA": "plain"}, "TRUENORM_CUDA=plain"),
        ("3.6.0", "13.0", {"TRUENORM_BACKEND": "plain"}, "TRUENORM_BACKEND=plain"),
        ("3.6.0", "13.0", {"TRUENORM_CUDA": "torch"}, "TRUENORM_CUDA=torch"),
        ("3.6.0", "13.0", {"TRUENORM_BACKEND": "torch"}, "TRUENORM_BACKEND=torch"),
    ],
)
def test_why_no_kernel_serves(
    triton: str | None, cuda: str | None, environment: dict[str, str], reason: str
) -> None:
    found = _triton._reason(triton, cuda, environment)
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TRUENORM_CUDA": "cuda"}, r"TRUENORM_CUDA \(='cuda'\) is unknown: set it to one of auto"),
        ({"TRUENORM_CUDA": "triton"}, "TRUENORM_CUDA=triton, but .* Triton 3.3.0 is too old"),
    ],
)
def test_a_backend_asked_for_by_name_loads_or_raises(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ImportError, match=message):
        _triton._reason("3.3.0", "13.0", environment)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "WHY_NOT", "")
    monkeypatch.setattr(_triton, "_devices", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.warns(RuntimeWarning, match=r"cuda:0, as fast: .* 7\.5 is below 8\.0"):
        assert _triton.why_plain(0)
    # once
    assert "7.5 is below 8.0" in _triton.why_plain(0)
    info = truenorm.info()
    assert info.cuda == "torch"
    assert "cuda: cuda:0 on torch's own operators (compute capability 7.5" in str(info)
    monkeypatch.setenv("TRUENORM_CUDA", "triton")
    _triton._devices.clear()
    with pytest.raises(RuntimeError, match="TRUENORM_CUDA=triton, but not on cuda:0"):
        _triton.why_plain(0)


@pytest.mark.skipif(PRETENDS, reason="nothing compiles under the mode that pretends a GPU")
def test_a_compiler_does_not_look_into_what_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asking the driver, or a warning, would break a graph in two."""
    monkeypatch.setattr(_triton, "WHY_NOT", "")
    monkeypatch.setattr(_triton, "_devices", {})
    asked: list[int] = []
    monkeypatch.setattr(_triton, "_probe", lambda index: asked.append(index) or "too old")
    call = torch.compile(lambda x: x + bool(_triton.why_plain(3)), fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match=r"cuda:3, as fast: too old"):
        assert call(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert call(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert asked == [3]
    torch.compiler.reset()


@pytest.mark.skipif(HAS_CUDA, reason="about a machine without a GPU")
def test_info_names_the_path() -> None:
    info = truenorm.info()
    assert info.other_devices == "torch"
    assert f"\ncuda: {info.cuda_words}\n" in str(info)
    if torch.version.cuda is None:
        assert info.cuda == "torch"
        assert "torch's own operators (this PyTorch is built without CUDA)" in info.cuda_words
    elif _triton.TRITON:
        # what would serve a GPU
        assert (info.cuda, info.cuda_words) == (
            "triton",
            f"Triton kernels (triton {_triton.TRITON})",
        )


@needs_triton
def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dtype that they have no code for, a device without them: the plain formulas."""
    monkeypatch.setattr(_triton, "why_plain", lambda index: "")
    calls: list[str] = []
    serve = _triton.serving("norm", lambda *args: calls.append("plain"))
    form = Form(geometry.layer(1), 1e-5)
    x = torch.randn(3, 4, device=DEVICE)
    rest = *[None] * 6, *form.numbers(x), 0.0
    serve(x.to(torch.float8_e4m3fn), *rest)
    serve(x[:0], *rest)
    assert calls == ["plain", "plain"]
    with launches():
        y, _ = serve(x, *rest)
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (4,)), atol=1e-6)
    assert calls == ["plain", "plain"]
    monkeypatch.setattr(_triton, "why_plain", lambda index: "no reason")
    serve(x, *rest)
    assert calls == ["plain"] * 3


def test_importing_truenorm_does_not_load_the_kernels() -> None:
    """Nor does it need Triton."""
    code = (
        "import sys; sys.modules['triton'] = None; import truenorm;"
        "print([m for m in sys.modules if m.startswith('truenorm._triton.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['truenorm._triton.config', 'truenorm._triton.tune']\n"


def test_every_operator_has_a_kernel_and_a_plain_form() -> None:
    pytest.importorskip("triton")
    from truenorm._triton import host

    assert set(host.KERNELS) >= set(operators.PLAIN)


# ---------------------------------------------------------------- parameters as they come


@needs_triton
def test_parameters_that_are_not_dense_or_of_another_dtype() -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64).to(DEVICE)
    wide = torch.randn(12, 2, dtype=torch.float64).to(DEVICE)
    weight, bias = wide[::2, 0], wide[1::2, 1].float()
    with triton_kernels():
        y = truenorm.functional.group_norm(x, 2, weight, bias)
    exact = truenorm.reference.group_norm(x, 2, weight, bias.double(), 1e-5)
    assert (y - exact).abs().max() < 1e-11


@needs_triton
def test_statistics_that_are_not_dense() -> None:
    x = torch.randn(7, 4).to(DEVICE)
    room = torch.rand(4, 2).to(DEVICE) + 0.5
    mean, var = room[:, 0], room[:, 1]
    before = mean.double(), var.double()
    with triton_kernels():
        y = truenorm.functional.batch_norm(x, mean, var)
        truenorm.functional.batch_norm(x, mean, var, training=True)
    exact = (x.double() - before[0]) / (before[1] + 1e-5).sqrt()
    assert (y - exact).abs().max() < 1e-5
    assert torch.allclose(mean.double(), 0.9 * before[0] + 0.1 * x.double().mean(0), atol=1e-6)
    assert torch.allclose(var.double(), 0.9 * before[1] + 0.1 * x.double().var(0), atol=1e-6)


# ---------------------------------------------------------------- launches


def count_launches(run: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    from triton.runtime.interpreter import GridExecutor

    launches = 0
    execute = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        execute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        run()
    return launches


def launches_of_a_step(
    layer: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    x = torch.randn(shape, requires_grad=True)
    outputs: list[torch.Tensor] = []
    forward = count_launches(lambda: outputs.append(layer(x)), monkeypatch)
    grad = torch.randn_like(outputs[0])
    backward = count_launches(lambda: outputs[0].backward(grad), monkeypatch)
    return forward, backward


# what docs/performance.md says: (layer, arguments, shape), launches forward and backward of a
# statistic that fits on chip, and of one that does not
LAUNCHES = [
    (("BatchNorm2d", (3,)), (4, 3, 5, 7), (2, 1), (4, 3)),
    (("InstanceNorm2d", (3, 1e-5, 0.1, True)), (2, 3, 5, 7), (1, 2), (3, 4)),
    (("GroupNorm", (2, 6)), (2, 6, 5, 7), (1, 2), (3, 4)),
    (("LayerNorm", (40,)), (5, 40), (1, 2), (3, 5)),
    (("RMSNorm", (40,)), (5, 40), (1, 2), (3, 5)),
    (("LocalResponseNorm", (3,)), (2, 5, 7), (1, 1), (1, 1)),
]


@needs_triton
@in_the_interpreter
@pytest.mark.parametrize("case", LAUNCHES, ids=lambda case: case[0][0])
def test_launches(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (name, args), shape, whole, chunks = case
    layer = getattr(truenorm, name)(*args)
    for cut, wanted in ((nullcontext, whole), (small_tiles, chunks)):
        with cut(), triton_kernels():
            assert launches_of_a_step(layer, shape, monkeypatch) == wanted


def modulated(layer: Any) -> Any:
    """With a scale and a shift for each sample, as views of one that has a gradient."""

    def call(x: torch.Tensor) -> torch.Tensor:
        like = layer.normalized_shape if "Layer" in type(layer).__name__ else x.shape[1:2]
        scale, shift = torch.ones(2, x.shape[0], *like).requires_grad_()
        return layer(x, scale=scale, shift=shift)  # type: ignore[no-any-return]

    return call


def of_image(layer: Any) -> Any:
    """Of (N, C, H, W), over the channels."""
    return lambda x: layer(x.permute(0, 2, 3, 1))


def as_given(layer: Any) -> Any:
    args = layer.weight, layer.bias, 1e-5, "layer", AS_GIVEN
    return lambda x: _orders._kernel(x.permute(0, 2, 3, 1), *args)


def of_heads(layer: Any) -> Any:
    """Of queries (B, H, S, D), a part of what one product gave."""
    return lambda x: layer(x[:, :, 0].transpose(1, 2))


# the same of what is one pass on a GPU too
ALONE = {"elementwise_affine": False}
LAUNCHES_MORE = [
    (modulated, truenorm.LayerNorm(40, **ALONE), (3, 5, 40), (1, 2), (3, 5)),
    (modulated, truenorm.GroupNorm(2, 6, affine=False), (2, 6, 5, 7), (1, 1), (3, 4)),
    (modulated, truenorm.BatchNorm2d(3, affine=False), (4, 3, 5, 7), (3, 4), (4, 4)),
    (of_image, truenorm.LayerNorm(6), (2, 6, 5, 7), (1, 2), (3, 5)),
    (as_given, truenorm.LayerNorm(6), (2, 6, 5, 7), (1, 2), (3, 5)),
    (of_heads, truenorm.RMSNorm(16), (2, 5, 3, 4, 16), (1, 2), (3, 5)),
]


@needs_triton
@in_the_interpreter
@pytest.mark.parametrize("case", LAUNCHES_MORE, ids=lambda case: case[0].__name__)
def test_launches_of_what_is_one_pass(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, layer, shape, whole, chunks = case
    for cut, wanted in ((nullcontext, whole), (small_tiles, chunks)):
        with cut(), triton_kernels():
            found = launches_of_a_step(call(layer), shape, monkeypatch)
        assert found == wanted


@needs_triton
@in_the_interpreter
def test_launches_of_a_sum_and_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from truenorm._triton import host

    x, weight, form = torch.randn(5, 40), torch.randn(40), Form(geometry.layer(1), 1e-5)
    bits = form.bits(x, KEEP | 7)
    made: list[Any] = []
    for cut, wanted in ((nullcontext, (1, 2)), (small_tiles, (3, 5))):
        with cut(), launches():
            made.clear()
            forward = count_launches(
                lambda: made.extend(host.add_norm(x, x, weight, weight, bits, 1e-5)), monkeypatch
            )
            y, h, record = made
            args = y, h, h, record, weight, bits, 1e-5
            backward = count_launches(partial(host.add_norm_backward, *args), monkeypatch)
        assert (forward, backward) == wanted


@needs_triton
@in_the_interpreter
@pytest.mark.parametrize("weight", [None, torch.randn(40)], ids=["bare", "weight"])
def test_launches_of_a_norm_beside_a_gate(weight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of parts for a weight's gradient alone."""
    from truenorm._triton import host

    x, bits = torch.randn(5, 40), UNCENTRED | 2 << GROUPS | KEEP | 3
    made: list[Any] = []
    with launches():
        forward = count_launches(
            lambda: made.extend(host.gated_norm(x, x, weight, bits, 1e-5, 1)), monkeypatch
        )
        y, record = made
        args = y, x, x, record, weight, bits, 1e-5, 1
        backward = count_launches(partial(host.gated_norm_backward, *args), monkeypatch)
    assert (forward, backward) == (1, 1 if weight is None else 2)


@needs_triton
def test_what_sizes_say_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shape, strides, a form and parts; and what is known is bounded."""
    from truenorm._triton import host, inputs

    asked: list[Any] = []
    cut = inputs._cut
    monkeypatch.setattr(inputs, "_CUTS", {})
    monkeypatch.setattr(inputs, "_MOST", 4)
    monkeypatch.setattr(inputs, "_cut", lambda *args: asked.append(args[1:]) or cut(*args))
    rows, weight = torch.randn(6, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    layer, rms = (Form(axes, 1e-5) for axes in (geometry.layer(1), geometry.rms(1)))
    calls = [
        (rows, None, layer), (rows, weight[0], layer), (rows, weight, layer), (rows, None, rms),
        (rows.T.contiguous().T, None, layer), (rows[:3].clone(), None, layer),
    ]  # fmt: skip
    with launches():
        for _ in range(2):
            for x, w, form in calls[:-1]:
                rest = *[None] * 5, *form.numbers(x), 0.0
                exact = torch.nn.functional.layer_norm(x, (4,))
                if form is layer and w is None:
                    assert torch.allclose(host.norm(x, w, *rest)[0], exact, atol=1e-4)
                else:
                    host.norm(x, w, *rest)
        # a weight of all is no other cut
        assert len(asked) == 4
        x, w, form = calls[-1]
        host.norm(x, w, *[None] * 5, *form.numbers(x), 0.0)
    assert len(asked) == 5
    assert len(inputs._CUTS) == 1


def test_choices_do_not_depend_on_the_batch() -> None:
    """They are not told it; and what they choose covers a statistic, within the limits."""
    for values in (1, 7, 64, 1000, 4096, 10_000, 2**21):
        for units in (1, 3, 64, 1000):
            for columns in (False, True):
                for width in (4, 8):
                    for backward in (False, True):
                        for grouped in (False, True):
                            launch = config.whole(
                                values, units, columns=columns, grouped=grouped, width=width,
                                backward=backward,
                            )  # fmt: skip
                            if launch is None:
                                continue
                            assert launch.values >= values
                            assert not grouped or launch.units >= units
                            assert launch.units * launch.values * width <= config.LIMITS.forward
                            assert launch.warps in (1, 2, 4, 8, 16)
                    tile = config.streamed(values, units, columns=columns, width=width)
                    assert tile.units * tile.values * width <= config.LIMITS.tile
                    cut = config.chunks(values, 5, tile, units)
                    assert cut.k_chunk * cut.k_chunks >= values
                    assert cut.k_chunk * (cut.k_chunks - 1) < values
                    assert cut.count == cut.k_chunks * -(-5 // cut.r_chunk)
                    steps = -(-cut.k_chunk // tile.values) * cut.r_chunk
                    assert steps <= config.LIMITS.steps
                    # more than a few are for samples that have enough for all multiprocessors
                    if steps > config.LIMITS.few_steps:
                        assert cut.count * -(-units // tile.units) >= config.LIMITS.programs


def test_programs_of_a_layer_norm() -> None:
    assert config.programs(10, 8, 132) == 10
    # as many warps whatever these are shared by
    for warps, each in ((2, 8), (8, 2), (16, 1), (32, 1)):
        assert config.programs(4096, warps, 132) == each * 132
    # no program adds up more than so many blocks
    assert config.programs(2**20, 8, 132) == 2**20 // config.LIMITS.blocks_per_program


@needs_triton
def test_what_is_summed_exactly_fuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual in half precision: a fused product would be counted twice."""
    from truenorm._triton import host, host_forward

    fuses: list[bool] = []

    def note(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        fuses.append(options["enable_fp_fusion"])

    monkeypatch.setattr(host_forward, "launch", note)
    form = Form(geometry.layer(1), 1e-5)
    given = Form(geometry.BATCH, 1e-5)
    mean = torch.empty(4, device="meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(6, 4, dtype=dtype, device="meta")
        for residual in (None, x):
            host.norm(x, mean, mean, None, residual, None, None, *form.numbers(x), 0.0)
            host.norm(x, mean, mean, None, residual, mean, mean, *given.numbers(x), 0.0)
    assert fuses == [True] * 4 + [True, True, False, False] * 2


def resources(tmp_path: Path, *args: str) -> str:
    """For an H100, ahead of time: a GPU is not needed, but what the interpreter does not see is."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "triton_resources.py", "--quick", *args],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 of the launches spill" in done.stdout
    return done.stdout


@needs_triton
def test_every_kernel_compiles_without_spilling(tmp_path: Path) -> None:
    said = resources(tmp_path, "--dtype", "bfloat16")
    kernels = {"forward", "moments", "merge_moments", "normalize", "backward", "backward_sums"}
    kernels |= {"merge_sums", "backward_apply", "move"}
    kernels |= {"local_response", "local_response_backward", "gated", "gated_backward"}
    assert kernels <= set(said.split())
    # 32 lanes along the channels
    line = next(x for x in said.splitlines() if "GroupNorm, channels_last small" in x)
    assert re.search(r"\(0 first\)$", line), line


@needs_triton
def test_what_is_read_ahead_fits_smaller_gpus(tmp_path: Path) -> None:
    """Of compute capability 8.6: 99 KiB of shared memory to a program; the longest rows."""
    code = """
import torch, triton_compile, triton_resources as r
float32, launches = torch.float32, []
for shape in ((64, 16384), (64, 8192)):
    launches += r._launches(r.LAYER, shape, float32, False, r.Extra(2, residual=True))
    launches += r._sum(shape, float32) + r._launches(r.RMS, shape, float32, False)
staged = set()
for launch in launches:
    found = triton_compile.compile_for(launch, 86)
    assert found.shared <= 99 * 1024, (launch.kernel, found.shared)
    staged.add((launch.kernel.__name__, launch.arguments.get("STAGES", 1)))
assert {("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)} <= staged, staged
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "tools"), environment.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_masks_and_activations_spill_nothing(tmp_path: Path) -> None:
    """Those that take the most: a tile under a mask, with a residual and an activation."""
    code = """
import torch, triton_compile, triton_resources as r
for name in ("LayerNorm, wide", "GroupNorm, channels_last small"):
    case = next(case for case in r.CASES if case[0] == name)
    launches = r._launches(*case[1:3], torch.bfloat16, case[3], r.Extra(6, True, True))
    for launch in launches:
        assert not triton_compile.compile_for(launch, 90).spills, (name, launch.kernel)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "tools"), environment.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_more_samples_change_no_layout(tmp_path: Path) -> None:
    """Which lanes hold what of a tile sets the order of a sample's sums."""
    said = resources(tmp_path, "--batches", "--dtype", "float32")
    assert "\n0 of the kernels are laid out in another way for more samples" in said
