"""What another library's norm computes, as one value: which formula, and where it rounds."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["rms", "layer", "group", "batch", "frozen", "l2", "response", "weight"]
Rounding = Literal["once", "cast_first", "to_weight", "steps"]

KINDS: tuple[Kind, ...] = (
    "rms", "layer", "group", "batch", "frozen", "l2", "response", "weight"
)  # fmt: skip
ROUNDINGS: tuple[Rounding, ...] = ("once", "cast_first", "to_weight", "steps")


class Rule(NamedTuple):
    """What a norm is: y = x̂ · (offset + weight) + bias, and the order of its casts.

    kind: "rms", x̂ = x / sqrt(E[x²] + eps); "layer" and "group", x̂ = (x − E[x]) / sqrt(Var[x] +
        eps); "batch", torch's BatchNorm with whatever `after` names behind it; "frozen", a
        BatchNorm by its running_mean and running_var alone, which never move; "l2", x̂ = x / ‖x‖ ·
        sqrt(C); "response", ConvNeXt V2's GRN, x + weight · (x · n) + bias with n = ‖x‖ of each
        channel over its positions, divided by its mean over the channels + eps; "weight", a
        convolution whose `weight` is standardized, each output's by itself, with the rule's weight
        for its gain (times `scale` where the module has that).
    rounding: "once", x̂ and the affine step in float32, then a cast to the input's dtype;
        "cast_first", x̂ is cast to the input's dtype before the affine step, which promotes;
        "to_weight", x̂ is cast to weight's dtype where that is half precision; "steps", every step
        in the input's own dtype, which truenorm serves in float32 alone.
    weight, bias: names of the attributes; None where the norm has none.
    eps: name of the attribute, or the number itself.
    offset: 1 for a norm that multiplies by 1 + weight.
    wide_offset: whether that sum is taken in float32, not in weight's dtype.
    axis: −1, the last dimension, or 1, the channels of an image (N, C, H, W).
    groups: of "group", and of "rms" with a gate: name of the attribute, or the number.
    after: names of the submodules that the result goes through, in their order.
    wide_output: of "once": whether the output has the dtype that weight and input promote to.
    gate: where a second input counts: "before", x · act(gate) is what is normalized, in float32;
        "within", the result is multiplied by act(gate) in float32, before its cast; "after", after
        that cast, in float32 again, and then cast to the input's dtype.
    gate_act: "silu" or "sigmoid".
    group_size: in the place of groups, how many features each has: an attribute, or the number.
    heads: of "rms" and "layer": whether weight and bias are (H, D), a row for each head of inputs
        (*, H, D), of whose last dimension the statistics are. Read off the module's own weight,
        whatever a rule says.
    """

    kind: Kind
    rounding: Rounding = "once"
    weight: str | None = "weight"
    bias: str | None = None
    eps: str | float | None = "eps"
    offset: float = 0.0
    wide_offset: bool = True
    axis: int = -1
    groups: str | int | None = None
    after: tuple[str, ...] = ()
    wide_output: bool = False
    gate: Literal["before", "within", "after"] | None = None
    gate_act: str = "silu"
    group_size: str | int | None = None
    heads: bool = False

    def words(self) -> str:
        """As a survey shows it: "rms, cast_first, 1 + weight"."""
        said: list[str] = [self.kind, self.rounding]
        if self.offset:
            said.append(f"{self.offset:g} + {self.weight}")
        if self.weight is None and self.kind != "weight":
            said.append("no weight")
        if self.axis == 1:
            said.append("over channels")
        if self.heads:
            said.append("a row per head")
        if self.group_size or (self.groups and self.kind == "rms"):
            said.append("in groups")
        if self.gate:
            at = {"before": "of x ·", "within": "with ·", "after": "then ·"}[self.gate]
            said.append(f"{at} {self.gate_act}(gate)")
        said += [f"then {name}" for name in self.after]
        return ", ".join(said)
