"""Drop-in: signatures, repr, state, pickle, copies, parametrizations and checkpoints as torch's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from cases import AFFINE, CASES, IDS, Case, exact, randomize, run
from checking import check_layer
from tolerances import FLOAT32_BETWEEN, assert_output, relative
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import truenorm
import truenorm.functional as F

NAMES = truenorm.nn.__all__
LAZY = [name for name in NAMES if name.startswith("Lazy")]
EVERY = pytest.mark.parametrize("case", CASES, ids=IDS)
WITH_WEIGHT = [case for case in CASES if case.layer != "LocalResponseNorm"]
# torch has none of a sum
FUNCTIONS = [name for name in F.__all__ if not name.startswith("add_")]
# of truenorm's layers, beyond torch's
OWN_ARGUMENTS = {
    "process_group": None,
    "channel_axis": 1,
    "statistics_frozen": False,
    "on_single": "error",
    "skip_nonfinite": False,
    "virtual_batch_size": None,
    "renorm": False,
    # without renorm nothing asks for these
    "rmax": 3.0,
    "dmax": 5.0,
    "activation": None,
    "overwrite_input": False,
    # each is of one activation, and without it nothing asks for it
    "leaky_relu_slope": 0.01,
    "elu_alpha": 1.0,
    "gelu_approximate": "none",
}


def test_every_norm_layer_of_torch_is_here() -> None:
    theirs = {
        name
        for name, cls in vars(torch.nn).items()
        if inspect.isclass(cls) and name.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))
    }
    # it draws with compiled kernels of its own, and has no parameters: torch has marked it legacy
    theirs -= {"CrossMapLRN2d"}
    assert set(NAMES) == theirs
    assert all(getattr(truenorm, name) is getattr(truenorm.nn, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name).__init__) for m in (truenorm.nn, torch.nn))
    # what is truenorm's own comes last, has to be named, and is off by default
    for extra in list(ours.parameters.values())[len(theirs.parameters) :]:
        assert extra.name in OWN_ARGUMENTS
        assert (extra.kind, extra.default) == (
            inspect.Parameter.KEYWORD_ONLY,
            OWN_ARGUMENTS[extra.name],
        )
        ours = ours.replace(parameters=list(ours.parameters.values())[: len(theirs.parameters)])
    for one, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
def test_bias_is_a_keyword_where_torch_has_it(name: str) -> None:
    parameters = inspect.signature(getattr(torch.nn, name).__init__).parameters
    if "bias" in parameters:
        assert getattr(truenorm, name)(5, bias=False).bias is None
        with pytest.raises(TypeError, match="positional argument"):
            getattr(truenorm, name)(5, 1e-5, 0.1, True, True, None, None, None, False)
    else:
        assert "bias" not in inspect.signature(getattr(truenorm, name).__init__).parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (F, torch.nn.functional))
    count = len(theirs.parameters)
    extra = {each.name: each for each in list(ours.parameters.values())[count:]}
    masked = name in ("batch_norm", "instance_norm", "group_norm")
    own = ["mask", "lengths", "padding_value"] if masked else []
    own += ["scale", "shift"] if name != "local_response_norm" else []
    assert list(extra) == own
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in extra.values())
    ours = ours.replace(parameters=list(ours.parameters.values())[:count])
    for one, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)


@pytest.mark.parametrize("name", NAMES)
def test_subclass_of_torch(name: str) -> None:
    ours, theirs = getattr(truenorm, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert (ours.__name__, ours.__module__) == (name, "truenorm.nn")
    if name.startswith("Batch"):
        assert issubclass(ours, torch.nn.modules.batchnorm._BatchNorm)


@EVERY
def test_repr_and_state_as_torch(case: Case) -> None:
    ours, theirs = case.build(), case.build(torch.nn)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    for kind in ("state_dict", "named_parameters", "named_buffers"):
        one, other = (dict(getattr(layer, kind)()) for layer in (ours, theirs))
        assert list(one) == list(other)
        assert [(v.shape, v.dtype) for v in one.values()] == [
            (v.shape, v.dtype) for v in other.values()
        ]
    assert vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers(name: str) -> None:
    kwargs = {} if "Batch" in name else {**AFFINE, "track_running_stats": True}
    ours, theirs = getattr(truenorm, name)(**kwargs), getattr(torch.nn, name)(**kwargs)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 5, *[7] * int(name[-2]))
    y, expected = ours(x), theirs(x)
    assert type(ours) is getattr(truenorm, name.removeprefix("Lazy"))
    assert relative(y.detach(), expected.detach()) < FLOAT32_BETWEEN
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fresh = getattr(truenorm, name)(**kwargs)
    fresh.load_state_dict(theirs.state_dict())
    assert fresh.eval()(x).shape == x.shape
    assert fresh.num_features == 5
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh(x), ours.eval()(x))


@EVERY
def test_pickle_save_and_deepcopy(case: Case) -> None:
    layer, x = case.build(), case.input()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    others = [
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.load(saved, weights_only=False),
    ]
    expected = layer(x)
    for other in others:
        assert type(other) is type(layer)
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(layer)


@pytest.mark.parametrize("case", WITH_WEIGHT, ids=lambda case: case.id)
def test_checkpoints_move_both_ways(case: Case) -> None:
    ours, theirs = case.build(), case.build(torch.nn)
    for source, target in ((theirs, ours), (ours, theirs)):
        randomize(source)
        saved = io.BytesIO()
        torch.save(source.state_dict(), saved)
        saved.seek(0)
        found = target.load_state_dict(torch.load(saved, weights_only=True), strict=True)
        assert not found.missing_keys
        assert not found.unexpected_keys
        x = case.input()
        y, expected = target.eval()(x), source.eval()(x)
        assert relative(y.detach(), expected.detach()) < FLOAT32_BETWEEN


def test_an_old_checkpoint_without_num_batches_tracked() -> None:
    old = randomize(torch.nn.BatchNorm2d(5)).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = truenorm.BatchNorm2d(5)
    layer.load_state_dict(old, strict=True)
    assert layer.num_batches_tracked.item() == 0
    check_layer(layer, torch.randn(3, 5, 7, 9))


@pytest.mark.parametrize("case", WITH_WEIGHT, ids=lambda case: case.id)
def test_to(case: Case) -> None:
    layer = case.build()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == dtype
        check_layer(layer, case.input(dtype))
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("way", ["eager", "activation", "compiled"])
def test_a_batch_norm_pruned_by_its_tensors(
    way: str, options: dict[str, bool], training: bool
) -> None:
    """Of the channels 0 and 2, with num_features as it was."""
    kept = torch.tensor([0, 2])
    theirs = randomize(torch.nn.BatchNorm1d(3, **options)).train(training)
    for held in (theirs._parameters, theirs._buffers):
        for name, t in held.items():
            if t is not None and t.dim():
                held[name] = type(t)(t.detach()[kept])
    ours: Any = truenorm.convert(copy.deepcopy(theirs))
    x = torch.randn(5, 2, 7)
    wanted = theirs(x)
    if way == "activation":
        ours.activation, wanted = "relu", wanted.relu()
    call = torch.compile(ours, backend="eager", fullgraph=True) if way == "compiled" else ours
    torch.testing.assert_close(call(x), wanted)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    with pytest.raises(RuntimeError, match="num_features"):
        ours(torch.randn(5, 4, 7))


def test_to_keeps_the_parameters_and_moves_the_statistics() -> None:
    layer = CASES[2].build()
    weight = layer.weight
    layer.bfloat16()
    assert layer.weight is weight
    assert layer.to("meta").running_mean.is_meta
    assert layer.running_mean.dtype == torch.float32


def test_reset_parameters_and_running_stats() -> None:
    layer = CASES[2].build()
    layer(CASES[2].input())
    layer.reset_parameters()
    fresh = torch.nn.BatchNorm2d(5)
    for name, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)


@pytest.mark.parametrize(
    "case", [CASES[2], CASES[6], CASES[9], CASES[10], CASES[12]], ids=lambda c: c.id
)
def test_a_parametrized_weight(case: Case) -> None:
    class Positive(torch.nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return torch.nn.functional.softplus(w)

    layer = case.build()
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", Positive())
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x, grad = case.input(), torch.randn(case.shape)
    wanted = run(plain, x, grad)
    original = layer.parametrizations.weight.original
    y = layer(x)
    assert torch.equal(y, wanted.output)
    (found,) = torch.autograd.grad(y, [original], grad)
    assert relative(found, wanted.weight * torch.sigmoid(original)) < FLOAT32_BETWEEN


def test_weight_norm() -> None:
    case = CASES[10]
    layer = parametrizations.weight_norm(case.build(), dim=None)
    x, grad = case.input(), torch.randn(case.shape)
    assert_output(layer(x).detach(), exact(copy.deepcopy(layer), x, grad).output)
    layer(x).backward(grad)
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


class Tagged(torch.Tensor):
    """A tensor subclass that keeps its class, as masked and distributed tensors do."""


@EVERY
def test_tensor_subclasses_are_kept_as_torch_keeps_them(case: Case) -> None:
    ours, theirs = case.pair()
    x = case.input().as_subclass(Tagged)
    y, expected = ours.eval()(x), theirs.eval()(x)
    assert type(y) is type(expected) is Tagged
    assert (
        relative(y.as_subclass(Tensor).detach(), expected.as_subclass(Tensor).detach())
        < FLOAT32_BETWEEN
    )


def test_functions_can_be_overridden() -> None:
    class Refuses:
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func.__name__

    for name in FUNCTIONS:
        extra: tuple[Any, ...] = {"batch_norm": (None, None), "instance_norm": ()}.get(name, (1,))
        assert getattr(F, name)(Refuses(), *extra) == name


def test_hooks_run() -> None:
    layer, seen = CASES[2].build(), []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = CASES[2].input().requires_grad_()
    layer(x).backward(torch.randn(x.shape))
    assert seen == ["before", "after", "backward"]
