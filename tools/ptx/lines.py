"""The text of a kernel: its instructions, and what the assembler may make of them."""

from __future__ import annotations

import re
from typing import NamedTuple

from .values import PtxError


class Line(NamedTuple):
    """An instruction as it is written: @guard name operands."""

    guard: str
    name: str
    operands: tuple[str, ...]
    text: str


def _split(text: str) -> tuple[str, ...]:
    """At commas outside of braces and brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def read(body: str) -> tuple[list[Line], dict[str, int]]:
    """Instructions, and where labels point."""
    labels: dict[str, int] = {}
    lines: list[Line] = []
    body = re.sub(r"//[^\n]*", "", body).strip("{} \n\t")
    # registers of a scope of its own are those that take what nobody asks for
    for text in re.split(r";|(?<=:)\s|\n", body):
        text = re.sub(r"^\{ (?=\.)", "", text.strip())
        label = re.fullmatch(r"(\$\w+):", text)
        if label:
            labels[label.group(1)] = len(lines)
        elif text and not text.startswith(".") and text not in "{}":
            written = re.fullmatch(r"(@!?%p\d+)?\s*([a-z][\w.:]*)\s*(.*)", text)
            if written is None:
                raise PtxError(f"an instruction that is not known: {text}")
            guard, name, operands = written.groups()
            # .shared says as much, and some versions of Triton leave it at that
            name = name.replace(".shared::cta", ".shared")
            lines.append(Line(guard or "", name, _split(operands), text))
    return lines, labels


def contracted(lines: list[Line], targets: set[int]) -> list[Line]:
    """With products fused into sums, wherever neither is rounded by name.

    A product that a sum of the same straight piece of code takes, and whose factors are still what
    they were, may be fused into that. targets: where jumps go.
    """
    made: list[Line] = []
    products: dict[str, Line] = {}
    for i, line in enumerate(lines):
        if i in targets or line.name.startswith("bra"):
            products.clear()
        made.append(_fused(line, products))
        # whatever is written anew is no product any more, nor a factor
        target = line.operands[0] if line.operands else ""
        names = {part.strip() for part in re.split(r"[{},|]", target)}
        products = {
            name: product
            for name, product in products.items()
            if name not in names and not names & {*product.operands[1:]}
        }
        is_product = line.name in ("mul.f32", "mul.f64") and not line.guard
        if is_product and target not in line.operands[1:]:
            products[target] = line
    return made


def _fused(line: Line, products: dict[str, Line]) -> Line:
    head, _, kind = line.name.partition(".")
    if head not in ("add", "sub") or kind not in ("f32", "f64"):
        return line
    target, a, b = line.operands
    # `less` and `minus` are names of this machine's own: a b − c, c − a b
    for product, other, name in ((a, b, "less"), (b, a, "minus")):
        found = products.get(product)
        if found is not None and found.name == f"mul.{kind}":
            name = name if head == "sub" else "rn"
            operands = (target, *found.operands[1:], other)
            return line._replace(name=f"fma.{name}.{kind}", operands=operands)
    return line
