"""torch's own ModuleInfo database: every sample of every norm layer, run on truenorm's class.

What torch.testing's TestModule does with a layer on CPU is done here, against torch's own layer in
float64 with the same state.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import randomize
from checking import same_layout
from counts import passed
from tolerances import assert_output
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like

import truenorm

ENTRIES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls.__name__ in truenorm.__all__
}
NAMES = list(ENTRIES)
BOTH_MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EVERY_DTYPE = [(name, dtype) for name in NAMES for dtype in ENTRIES[name].dtypes]
EVERY = pytest.mark.parametrize(
    ("name", "dtype"),
    EVERY_DTYPE,
    ids=[f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in EVERY_DTYPE],
)


def test_every_norm_layer_of_the_database_is_here() -> None:
    norms = {info.module_cls.__name__ for info in module_db if "Norm" in info.module_cls.__name__}
    # without an entry of their own for CPU: SyncBatchNorm and the lazy layers
    assert set(NAMES) == norms
    assert len(NAMES) == 10


def samples(name: str, dtype: torch.dtype, training: bool, grad: bool = False) -> Iterator[Any]:
    info = ENTRIES[name]
    yield from info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=grad, training=training
    )


def build(namespace: Any, name: str, sample: Any, dtype: torch.dtype, training: bool) -> Any:
    built = sample.constructor_input
    layer = getattr(namespace, name)(*built.args, **built.kwargs)
    return randomize(layer.to(dtype).train(training))


def forward(layer: Any, sample: Any) -> Any:
    return layer(*sample.forward_input.args, **sample.forward_input.kwargs)


def layers(
    name: str, dtype: torch.dtype, training: bool, grad: bool = False
) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """Each sample: the sample, truenorm's layer and its input."""
    for sample in samples(name, dtype, training, grad):
        (x,) = sample.forward_input.args
        yield sample, build(truenorm, name, sample, dtype, training), x


@BOTH_MODES
@EVERY
def test_forward_and_gradients(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for sample, layer, x in layers(name, dtype, training, grad=True):
        theirs = build(torch.nn, name, sample, torch.float64, training)
        theirs.load_state_dict(layer.state_dict())
        wide = x.detach().double().requires_grad_()
        exact = theirs(wide)
        if sample.reference_fn is not None:
            # torch's own precision for these, whose arithmetic is float32 in places
            one, other = copy.deepcopy(layer), copy.deepcopy(layer)
            torch.testing.assert_close(
                one(x), sample.reference_fn(other, x), rtol=1e-5, atol=1e-5, check_dtype=False
            )
        y = layer(x)
        assert y.dtype == dtype
        assert_output(y.detach(), exact.detach())
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value, check_dtype=False)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
        wanted = torch.autograd.grad(exact, [wide, *theirs.parameters()], grad.double())
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected.to(actual.dtype))
        count += 1
    passed("ModuleInfo", "forward and gradients", count)


@BOTH_MODES
@EVERY
def test_pickle_save_and_deepcopy(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for sample, layer, x in layers(name, dtype, training):
        with torch.no_grad():
            saved = io.BytesIO()
            torch.save(layer, saved)
            saved.seek(0)
            others = [
                pickle.loads(pickle.dumps(layer)),
                torch.load(saved, weights_only=False),
                copy.deepcopy(layer),
            ]
            y = layer(x)
            for other in others:
                assert type(other) is type(layer)
                assert torch.equal(forward(other, sample), y)
        count += 1
    passed("ModuleInfo", "pickle, save, deepcopy", count)


@BOTH_MODES
@EVERY
def test_repr(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for sample, layer, _ in layers(name, dtype, training):
        assert repr(layer) == repr(build(torch.nn, name, sample, dtype, training))
        assert str(layer) == repr(layer)
        count += 1
    passed("ModuleInfo", "repr", count)


@EVERY
def test_factory_kwargs(name: str, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(name, dtype, training=True):
        built = sample.constructor_input
        if name != "LocalResponseNorm":  # creates no tensor, and takes no factory arguments
            layer = getattr(truenorm, name)(*built.args, **built.kwargs, device="cpu", dtype=dtype)
            state = layer.state_dict().values()
            assert all(v.dtype == dtype for v in state if v.is_floating_point())
            with torch.device("meta"):
                on_meta = getattr(truenorm, name)(*built.args, **built.kwargs)
            assert all(v.is_meta for v in on_meta.state_dict().values())
            on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
        count += 1
    passed("ModuleInfo", "factory arguments", count)


@BOTH_MODES
@EVERY
def test_noncontiguous(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for _, layer, x in layers(name, dtype, training):
        results = []
        for of_input, of_parameters in itertools.product((False, True), repeat=2):
            one = copy.deepcopy(layer)
            if of_parameters:
                for parameter in one.parameters():
                    parameter.data = noncontiguous_like(parameter.data)
            value = noncontiguous_like(x) if of_input else x.clone()
            value = value.detach().requires_grad_()
            y = one(value)
            grad = torch.linspace(-1.0, 2.0, y.numel(), dtype=dtype).reshape(y.shape)
            gradients = torch.autograd.grad(y, [value, *one.parameters()], grad)
            results.append((y, *gradients))
        for result in results[1:]:
            for actual, expected in zip(result, results[0], strict=True):
                torch.testing.assert_close(actual, expected)
        count += 1
    passed("ModuleInfo", "noncontiguous", count)


@BOTH_MODES
@EVERY
def test_memory_format(name: str, dtype: torch.dtype, training: bool) -> None:
    """Every format of input and parameters; unlike torch's InstanceNorm the output keeps it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    count = 0
    for sample, layer, x in layers(name, dtype, training):
        batched = not (name.startswith("Instance") and x.dim() == int(name[-2]) + 1)
        expected = copy.deepcopy(layer)(x)
        for memory_format in (torch.contiguous_format, formats.get(x.dim())):
            if memory_format is None:
                continue
            one = copy.deepcopy(layer).to(memory_format=memory_format)
            value = x.contiguous(memory_format=memory_format)
            y = one(value)
            torch.testing.assert_close(y, expected)
            if batched and name not in ("LayerNorm", "RMSNorm"):
                assert same_layout(y, value), sample
        count += 1
    passed("ModuleInfo", "memory formats", count)


@BOTH_MODES
@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name: str, training: bool) -> None:
    count = 0
    for _, layer, x in layers(name, torch.float64, training, grad=True):
        parameters = dict(layer.named_parameters())

        def of(
            x: torch.Tensor, *values: torch.Tensor, layer: Any = layer, names: Any = parameters
        ) -> torch.Tensor:
            state = dict(zip(names, values, strict=True))
            buffers = {k: v.clone() for k, v in layer.named_buffers()}
            return torch.func.functional_call(layer, {**state, **buffers}, (x,))

        inputs = (x, *parameters.values())
        # fast mode, random directions in place of every entry, as torch's own runs of these tests
        checks = {"check_batched_grad": True, "fast_mode": True}
        assert gradcheck(of, inputs, check_forward_ad=True, **checks)
        assert gradgradcheck(of, inputs, check_fwd_over_rev=True, **checks)
        count += 1
    passed("ModuleInfo", "gradcheck and gradgradcheck", count)


@pytest.mark.parametrize("name", NAMES)
def test_whether_the_modes_differ(name: str) -> None:
    """torch's way: a layer that does without `training` cannot behave differently by it."""
    count = 0
    for _, layer, x in layers(name, torch.float32, training=True):
        del layer.training
        if ENTRIES[name].train_and_eval_differ:
            with pytest.raises(AttributeError, match="training"):
                layer(x)
        else:
            assert layer(x).shape == x.shape
        count += 1
    passed("ModuleInfo", "modes", count)


@pytest.mark.parametrize("name", [n for n in NAMES if ENTRIES[n].module_error_inputs_func])
def test_error_inputs(name: str) -> None:
    info, count = ENTRIES[name], 0
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        sample = error.module_error_input
        built = sample.constructor_input
        cls = getattr(truenorm, name)
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                cls(*built.args, **built.kwargs)
        else:
            layer = cls(*built.args, **built.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                forward(layer, sample)
        count += 1
    passed("ModuleInfo", "errors", count)
