"""inspect: every number against float64, every finding on a layer made for it, no trace left."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import randomize
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm import inspect

TRACKING = {"affine": True, "track_running_stats": True}
# sums of float64 in another order
CLOSE = 1e-9


def close(values: tuple[float, ...], exact: Tensor) -> bool:
    return torch.allclose(torch.tensor(values, dtype=torch.float64), exact.double(), CLOSE, CLOSE)


def batches(*shape: int) -> list[Tensor]:
    """Two batches whose channels differ in mean and spread."""
    scale = torch.rand(shape[1:2]) + 0.5
    each = (-1, *(1,) * (len(shape) - 2))
    return [torch.randn(shape) * scale.view(each) + scale.view(each) * (i - 3.0) for i in (0, 1)]


def layer_table(layer: Module, data: Any, **kwargs: Any) -> Any:
    result = inspect(nn.Sequential(layer), data, **kwargs)
    assert [t.name for t in result.layers] == ["0"]
    return result.layers[0]


LAYERS = [
    (lambda: nn.BatchNorm1d(5), (7, 5)),
    (lambda: nn.BatchNorm1d(5), (3, 5, 9)),
    (lambda: truenorm.BatchNorm2d(5, eps=0.1), (3, 5, 7, 9)),
    (lambda: nn.BatchNorm2d(5, track_running_stats=False), (3, 5, 7, 9)),
    (lambda: nn.InstanceNorm2d(5, affine=True), (3, 5, 7, 9)),
    (lambda: truenorm.InstanceNorm3d(3, **TRACKING), (2, 3, 5, 3, 7)),
    (lambda: nn.GroupNorm(2, 6), (3, 6, 5, 7)),
]


def own_statistics(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each statistic, spread over (statistics, channels)."""
    n, c = x.shape[:2]
    wide = x.double().reshape(n, c, -1)
    if isinstance(layer, nn.GroupNorm):
        wide = wide.reshape(n, layer.num_groups, 1, -1).expand(-1, -1, c // layer.num_groups, -1)
        wide = wide.reshape(n, c, -1)
    elif not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        wide = wide.transpose(0, 1).reshape(1, c, -1)
    return wide.mean(2), wide.var(2, correction=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_layers_over_channels(build: Any, shape: tuple[int, ...], last: bool) -> None:
    layer, data = randomize(build()), batches(*shape)
    if last:
        if len(shape) < 4:
            pytest.skip("no channels_last")
        kind = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        data = [x.contiguous(memory_format=kind) for x in data]
    t = layer_table(layer, iter(data))
    assert (t.calls, t.shape, t.dtype, t.num_channels) == (2, shape, "float32", shape[1])
    assert t.channels_last == last
    everything = torch.cat(data).double().transpose(0, 1).flatten(1)
    mean, var = everything.mean(1), everything.var(1, correction=0)
    assert close(t.channels.mean, mean)
    assert close(t.channels.std, var.sqrt())
    assert t.values_seen == everything.shape[1]
    own = [own_statistics(layer, x) for x in data]
    means, variances = (torch.cat(parts) for parts in zip(*own, strict=True))
    assert close(t.channels.offset, (means.abs() / variances.sqrt()).amax(0))
    tracked = getattr(layer, "running_var", None) is not None
    assert t.uses_running == tracked
    if tracked:
        running_mean, used = layer.running_mean.double(), layer.running_var.double()
        assert close(t.channels.running_mean, running_mean)
        assert close(t.channels.running_std, used.sqrt())
        count = everything.shape[1]
        if isinstance(layer, nn.InstanceNorm3d):
            var, count = variances.mean(0), math.prod(shape[2:])
        assert close(t.channels.z, (mean - running_mean) / used.sqrt())
        p = torch.distributions.Normal(mean, (var * count / (count - 1)).sqrt())
        q = torch.distributions.Normal(running_mean, used.sqrt())
        assert close(t.channels.kl, torch.distributions.kl_divergence(p, q))
    else:
        used = variances.mean(0)
        assert t.channels.kl == t.channels.z == ()
    assert close(t.channels.eps_share, layer.eps / (used + layer.eps))
    assert t.eps_share_largest >= max(t.channels.eps_share) * (1.0 - CLOSE)
    assert close(t.channels.weight, layer.weight)
    assert 0.0 < t.torch_error < 1e-5
    assert 0.0 < t.truenorm_error < 2e-6
    assert sum(t.before.counts) == min(data[0].numel(), sum(t.before.counts)) > 0
    low, high = data[0].min().item(), data[0].max().item()
    assert low <= t.before.low < t.before.high <= high
    # the output is another distribution
    assert (t.after.low, t.after.high) != (t.before.low, t.before.high)


@pytest.mark.parametrize("kind", [nn.LayerNorm, truenorm.LayerNorm, nn.RMSNorm])
def test_layers_over_trailing_dimensions(kind: Any) -> None:
    layer, data = randomize(kind((5, 7), eps=0.1)), batches(3, 4, 5, 7)
    t = layer_table(layer, iter(data))
    x = torch.cat(data).double().reshape(-1, 35)
    assert close(t.channels.mean, x.mean(0))
    assert close(t.channels.std, x.std(0, correction=0))
    assert (t.num_channels, t.values_per_statistic, t.values_seen) == (35, 35, 24)
    assert t.channels.offset == t.channels.eps_share == ()
    if kind is nn.RMSNorm:
        assert t.offset == 0.0
        var = x.square().mean(1)
    else:
        var = x.var(1, correction=0)
        assert t.offset == pytest.approx((x.mean(1).abs() / var.sqrt()).max().item())
    assert t.eps_share == pytest.approx((0.1 / (var.mean() + 0.1)).item())
    assert t.eps_share_largest == pytest.approx((0.1 / (var.min() + 0.1)).item())
    assert close(t.channels.weight, layer.weight.flatten())


def test_layers_of_other_libraries() -> None:
    class LayerNorm2d(nn.LayerNorm):
        """Over the channels of images, as in timm."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class LlamaRMSNorm(Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(7)), 1e-4

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (hidden.square().mean(-1, True) + 1e-4).rsqrt() * self.weight

    class BatchNormAct2d(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    x = torch.randn(2, 6, 4, 7)
    result = inspect(nn.Sequential(LayerNorm2d(6), LlamaRMSNorm(), BatchNormAct2d(6)), x)
    first, second, third = result.layers
    assert close(first.channels.mean, x.double().mean((0, 2, 3)))
    assert first.values_per_statistic == 6
    assert (second.eps, second.kind) == (1e-4, "LlamaRMSNorm")
    assert third.uses_running
    assert third.kind == "BatchNormAct2d"


class Model(Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout()
        self.unused = nn.InstanceNorm2d(6)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.drop(self.norm(self.conv(x)))


def snapshot(model: Module) -> tuple[Any, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return hooks, [m.training for m in model.modules()], tensors, torch.get_rng_state()


def unchanged(model: Module, before: tuple[Any, ...]) -> bool:
    now = snapshot(model)
    tensors = all(torch.equal(t, now[2][name]) for name, t in before[2].items())
    return now[:2] == before[:2] and tensors and torch.equal(now[3], before[3])


def failing(x: Tensor, error: Exception) -> Iterator[Tensor]:
    yield x
    raise error


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(training: bool) -> None:
    model = randomize(Model())
    model.norm.eval()
    x, wrong = torch.randn(4, 3, 8, 8), torch.randn(2, 4, 8, 8)
    before = snapshot(model)
    result = inspect(model, x, training=training)
    assert unchanged(model, before)
    assert result.training == training
    assert result.layers[0].uses_running is not training
    assert result.not_called == ("unused",)
    with pytest.raises(RuntimeError, match="failed at batch 1 with OSError: disk"):
        inspect(model, failing(x, OSError("disk")), training=training)
    assert unchanged(model, before)
    with pytest.raises(ValueError, match=r"failed on a batch of shape \(2, 4, 8, 8\)"):
        inspect(model, wrong, training=training)
    assert unchanged(model, before)
    with pytest.raises(KeyboardInterrupt, match="after 1 batch"):
        inspect(model, x, progress=_interrupt)
    assert unchanged(model, before)


@pytest.mark.parametrize("data", [torch.randn(2, 3, 8, 8).numpy(), "abc"], ids=["array", "text"])
def test_data_without_a_tensor(data: Any) -> None:
    with pytest.raises(ValueError, match=r"without a tensor \((ndarray|str)\).* — pass") as raised:
        inspect(Model(), iter([data]))
    assert "\n" not in str(raised.value)


def _interrupt(count: int) -> None:
    raise KeyboardInterrupt(f"after {count} batch")


def test_data_in_every_form() -> None:
    model, x = Model(), torch.randn(4, 3, 8, 8)
    expected = inspect(model, x).layers[0].channels.mean
    target = torch.zeros(4)
    done: list[int] = []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), 2)
    for data in (
        (x, target),
        [x, target],
        {"x": x, "y": target},
        iter([x]),
        [(x, target)],
        x.double(),
        loader,
    ):
        result = inspect(model, data, progress=done.append)
        assert result.layers[0].channels.mean == pytest.approx(expected, rel=1e-6)
    assert result.batches == 2
    assert done == [1] * 6 + [1, 2]
    assert inspect(model, loader, batches=1).batches == 1
    other = inspect(model, (target, x), call=lambda model, batch: model(batch[1]))
    assert other.layers[0].channels.mean == expected
    compiled = torch.compile(model)
    assert inspect(compiled, x).layers[0].channels.mean == expected


def test_bad_input() -> None:
    model, x = Model(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, but got int"):
        inspect(3, x)
    with pytest.raises(TypeError, match=r"`data` must be a batch .* or a loader .* got int"):
        inspect(model, 3)
    with pytest.raises(ValueError, match=r"\(Conv2d\) has no normalization layer"):
        inspect(model.conv, x)
    with pytest.raises(ValueError, match="a loader that gave no batch"):
        inspect(model, [])
    with pytest.raises(ValueError, match=r"list of 3 tensors of one shape.*iter\(data\)"):
        inspect(model, [x, x, x])
    with pytest.raises(ValueError, match=r"`batches` must be a whole number .* but got 0"):
        inspect(model, x, batches=0)
    with pytest.raises(ValueError, match=r"none of its 2 normalization layers.*'norm'"):
        inspect(model, x, call=lambda model, batch: model.conv(batch))
    with pytest.raises(ValueError, match="lazy 'weight' has no shape"):
        inspect(nn.LazyBatchNorm2d(), x)


def healthy() -> Any:
    layer: Any = nn.BatchNorm2d(6)
    for _ in range(200):
        layer(torch.randn(8, 6, 5, 5))
    return nn.Sequential(layer).eval()


def found(model: Module, x: Any, **kwargs: Any) -> dict[str, Any]:
    return {f.measure: f for f in inspect(model, x, **kwargs).findings}


def test_nothing_to_report() -> None:
    assert found(healthy(), torch.randn(8, 6, 5, 5)) == {}
    model = nn.Sequential(nn.GroupNorm(2, 6), nn.LayerNorm(5), nn.InstanceNorm2d(6), nn.RMSNorm(5))
    result = inspect(model, torch.randn(4, 6, 5, 5))
    assert result.findings == ()
    assert "nothing to report" in str(result)


def test_not_finite() -> None:
    x = torch.randn(8, 6, 5, 5)
    x[1, 4, 2] = math.nan
    x[0, 2, 0, 0] = math.inf
    result = inspect(healthy(), x)
    f = next(f for f in result.findings if f.measure == "nonfinite")
    assert (f.severity, f.channels) == ("error", (4, 2))
    assert "5 NaN and 1 Inf" in f.text
    assert (result.layers[0].nan, result.layers[0].inf) == (5, 1)
    assert result.layers[0].channels.nonfinite == (0, 0, 1, 0, 5, 0)
    assert json.loads(result.to_json())["layers"][0]["channels"]["mean"][4] is None
    model = healthy()
    model[0].running_var[3] = math.nan
    f = found(model, torch.randn(8, 6, 5, 5))["running_std"]
    assert (f.severity, f.channels) == ("error", (3,))
    for layer in (nn.LayerNorm((6, 5, 5)), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6)):
        assert found(nn.Sequential(layer), x)["nonfinite"].severity == "error"


def test_few_values() -> None:
    f = found(nn.Sequential(nn.InstanceNorm2d(6)), torch.randn(4, 6, 1, 2))["values_per_statistic"]
    assert f.severity == "warning"
    assert "only 2 values" in f.text

    # where torch does not refuse a single value
    f = found(nn.Sequential(nn.GroupNorm(6, 6)), torch.randn(4, 6))["values_per_statistic"]
    assert f.severity == "error"
    assert "its own mean" in f.text
    exec(f.remedy, {"model": (model := nn.Sequential(nn.GroupNorm(6, 6))), "torch": torch})
    assert type(model[0]) is nn.Identity
    batch = nn.Sequential(nn.BatchNorm1d(6))
    f = found(batch, torch.randn(4, 6), training=True)["values_per_statistic"]
    assert "noise of 50%" in f.text
    assert "values_per_statistic" not in found(batch, torch.randn(4, 6))


def test_the_error_of_torchs_kernel() -> None:
    layer = nn.GroupNorm(2, 6)
    x = (torch.randn(2, 6, 9, 9) + 1e3).contiguous(memory_format=torch.channels_last)
    exact = truenorm.reference.group_norm(x, 2)
    model = nn.Sequential(layer)
    t = inspect(model, x).layers[0]
    # of two samples the one with the larger offset
    actual = (layer(x).double() - exact).abs().amax((1, 2, 3)).tolist()
    assert any(t.torch_error == pytest.approx(a, rel=1e-3) for a in actual)
    assert t.truenorm_error < 2e-6
    f = found(model, x)["torch_error"]
    assert f.severity == ("error" if t.torch_error > 0.1 else "warning")
    exec(f.remedy, {"model": model, "truenorm": truenorm})
    assert "torch_error" not in found(model, x)


def test_an_offset_that_costs_low_precision_its_digits() -> None:
    x = torch.randn(4, 6, 9, 9)
    x[:, 2] += 40.0
    model = nn.Sequential(nn.InstanceNorm2d(6, affine=True))
    assert "offset" not in found(model, x)
    f = found(model.bfloat16(), x)["offset"]
    assert f.channels == (2,)
    assert f.text.startswith("in 1 of 6 channels the mean is up to")


def test_eps() -> None:
    x = torch.randn(8, 6, 5, 5)
    x[:, 1] = 3.0
    x[:, 4] *= 1e-3
    model = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False))
    f = found(model, x)["eps_share"]
    assert f.channels == (1, 4)
    assert "2 of 6 channels hardly vary, 1 of them constant" in f.text
    exec(f.remedy, {"model": model})
    assert model[0].weight[1] == model[0].weight[4] == 0.0 != model[0].weight[0]
    small = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), nn.LayerNorm(5))
    results = inspect(small[:1], 1e-3 * torch.randn(8, 6, 5, 5)).findings
    assert "6 of 6 channels" in results[0].text
    exec(results[0].remedy, {"model": small})
    assert small[0].eps == pytest.approx(1e-9, rel=0.5)
    f = found(small[1:], 1e-3 * torch.randn(8, 6, 5, 5))["eps_share"]
    assert "of the denominator" in f.text


def test_the_gap_between_training_and_evaluation() -> None:
    model = healthy()
    x = torch.randn(8, 6, 5, 5)
    x[:, 3] = 4.0 * x[:, 3] + 1.0
    x[:, 5] += 0.7
    f = found(model, x)["kl"]
    assert (f.severity, f.channels) == ("warning", (3, 5))
    assert "channel 3 has mean" in f.text
    f = found(model, 5.0 * torch.randn(8, 6, 5, 5))["kl"]
    assert (f.severity, len(f.channels)) == ("error", 6)
    f = found(nn.Sequential(nn.BatchNorm2d(6)), x)["kl"]
    assert f.severity == "error"
    assert "never updated" in f.text
    exec(f.remedy, {"model": model, "truenorm": truenorm, "loader": [x]})
    assert "kl" not in found(model, x)


def test_weights_and_statistics() -> None:
    model = healthy()
    model[0].weight.data[torch.tensor([1, 4])] = torch.tensor([0.0, -1e-4])
    f = found(model, torch.randn(8, 6, 5, 5))["weight"]
    assert (f.severity, f.channels) == ("note", (1, 4))
    exec(f.remedy, {"model": model, "torch": torch})
    assert model[0].weight_mask.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    zero = healthy()
    zero[0].weight.data.zero_()
    assert "all its weights" in found(zero, torch.randn(8, 6, 5, 5))["weight"].text
    half = healthy().bfloat16()
    f = found(half, torch.randn(8, 6, 5, 5))["running_std"]
    assert "bfloat16, which loses" in f.text
    left = healthy()
    left[0].train()
    f = found(left, torch.randn(8, 6, 5, 5))["uses_running"]
    exec(f.remedy, {"model": left})
    assert not left[0].training


def test_the_same_of_several_layers_is_said_once() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(6) for _ in range(6)))
    result = inspect(model, torch.randn(8, 6, 5, 5))
    assert len(result.findings) == 6
    assert str(result).count("never updated") == 1
    assert "ERROR 0: its" in str(result)
    assert "the like in 1, 2, 3, 4 and 1 more" in str(result)


def test_as_json() -> None:
    result = inspect(healthy(), torch.randn(8, 6, 5, 5))
    assert result.to_dict()["layers"][0]["channels"]["mean"] == result.layers[0].channels.mean
    loaded = json.loads(result.to_json())
    assert loaded["model"] == "Sequential"
    assert loaded["layers"][0]["channels"]["std"] == pytest.approx(
        result.layers[0].channels.std, rel=1e-5
    )
