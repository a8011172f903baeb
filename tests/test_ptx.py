"""tools/ptx, the machine that the compiled Triton kernels are tested on: right, and strict.

Against exact fractions, Python's own rounding and the PTX manual's tables. Kernels of truenorm on
it: test_triton_compiled.py.
"""

from __future__ import annotations

import math
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "tools"))
import ptx

WARP = 32


def kernel(body: str, threads: int = WARP, parameters: int = 1) -> ptx.Program:
    """%rd1, %rd2, ... are the arguments, %r1 the thread."""
    declared = ",\n".join(
        f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters)
    )
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(parameters))
    lines = "\n".join(line.strip() for line in body.splitlines())
    return ptx.Program(
        f".extern .shared .align 16 .b8 global_smem[];\n.visible .entry k(\n{declared}\n)\n"
        f".reqntid {threads}\n{{\n.reg .b32 %r<99>;\n{loads}\nmov.u32 %r1, %tid.x;\n{lines}\nret;\n"
        "}\n// -- End function",
        "k",
    )


def run(body: str, *tensors: torch.Tensor, threads: int = WARP, programs: int = 1) -> None:
    kernel(body, threads, len(tensors)).run(programs, 4096, tensors)


def applied(name: str, kinds: str, *columns: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """What an instruction makes of 32 lanes; kinds: of registers, the result's and operands'."""
    names = {"r": ("b32", 4), "d": ("b64", 8), "s": ("b16", 2)}
    prefix = {"r": "%r", "d": "%rd", "s": "%rs"}
    body, operands = [], []
    for i, kind in enumerate(kinds[1:]):
        bits, size = names[kind]
        body.append(f"mul.wide.u32 %rd{50 + i}, %r1, {size};")
        body.append(f"add.s64 %rd{50 + i}, %rd{50 + i}, %rd{i + 2};")
        body.append(f"ld.global.{bits} {{ {prefix[kind]}{20 + i} }}, [ %rd{50 + i} + 0 ];")
        operands.append(f"{prefix[kind]}{20 + i}")
    bits, size = names[kinds[0]]
    body.append(f"{name} {prefix[kinds[0]]}40, {', '.join(operands)};")
    body.append(f"mul.wide.u32 %rd60, %r1, {size};\nadd.s64 %rd60, %rd60, %rd1;")
    body.append(f"st.global.{bits} [ %rd60 + 0 ], {{ {prefix[kinds[0]]}40 }};")
    made = torch.empty(WARP, dtype=out)
    run("\n".join(body), made, *columns)
    return made


def exactly(value: Fraction, dtype: type) -> float:
    """Rounded to the nearest, as Python divides integers; to float32 by way of more digits."""
    if dtype is np.float64:
        return value.numerator / value.denominator
    if value == 0:
        return 0.0
    exponent = max(math.frexp(float(abs(value)))[1] - 24, -149)
    return math.ldexp(round(value * Fraction(2) ** -exponent), exponent)


def spread(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of many sizes, with ties and with what cancels."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(WARP, generator=generator, dtype=dtype)
    return made * 2.0 ** torch.randint(-12, 12, (WARP,), generator=generator).to(dtype)


@pytest.mark.parametrize("seed", range(20))
def test_a_fused_product_is_rounded_once(seed: int) -> None:
    for dtype, kind, letter, bits in (
        (torch.float32, np.float32, "r", "f32"),
        (torch.float64, np.float64, "d", "f64"),
    ):
        a, b = spread(dtype, 3 * seed), spread(dtype, 3 * seed + 1)
        # of every other the product is cancelled but for its own rounding
        c = torch.where(torch.arange(WARP) % 2 == 0, -(a * b), spread(dtype, 3 * seed + 2))
        made = applied(f"fma.rn.{bits}", letter * 4, a, b, c, out=dtype)
        for x, y, z, result in zip(*(t.tolist() for t in (a, b, c, made)), strict=True):
            assert result == exactly(Fraction(x) * Fraction(y) + Fraction(z), kind)


def test_conversions() -> None:
    x = spread(torch.float32, 1)
    x[:3] = torch.tensor([math.inf, -0.0, 3e38])
    other = spread(torch.float32, 2)
    pairs = applied("cvt.rn.bf16x2.f32", "rrr", x, other, out=torch.int32).view(torch.bfloat16)
    assert torch.equal(pairs.view(-1, 2), torch.stack([other, x], 1).to(torch.bfloat16))
    assert torch.equal(applied("cvt.rn.f16.f32", "sr", x, out=torch.float16), x.half())
    wide = spread(torch.float64, 3)
    assert torch.equal(applied("cvt.rn.f32.f64", "rd", wide, out=torch.float32), wide.float())
    half = spread(torch.bfloat16, 4)
    assert torch.equal(applied("cvt.f64.bf16", "ds", half, out=torch.float64), half.double())
    whole = torch.arange(-16, 16, dtype=torch.int32) * 7
    assert torch.equal(applied("cvt.s64.s32", "dr", whole, out=torch.int64), whole.long())
    unsigned = applied("cvt.u64.u32", "dr", whole, out=torch.int64)
    assert torch.equal(unsigned, whole.long() & 0xFFFFFFFF)
    cut = applied("cvt.rzi.s32.f32", "rr", torch.full((WARP,), -2.7), out=torch.int32)
    assert cut.tolist() == [-2] * WARP


def test_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**31), 2**31, (WARP,), generator=generator).int()
    b = torch.randint(1, 99, (WARP,), generator=generator).int() * torch.tensor([1, -1] * 16).int()

    def of(name: str, *columns: torch.Tensor, out: torch.dtype = torch.int32) -> list[int]:
        kinds = ("d" if out is torch.int64 else "r") + "r" * len(columns)
        return applied(name, kinds, *columns, out=out).tolist()

    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    cut = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    assert of("div.s32", a, b) == cut
    assert of("rem.s32", a, b) == [x - q * y for (x, y), q in zip(pairs, cut, strict=True)]
    assert of("mul.wide.s32", a, b, out=torch.int64) == [x * y for x, y in pairs]
    low = [x * y & 0xFFFFFFFF for x, y in pairs]
    assert [x & 0xFFFFFFFF for x in of("mul.lo.s32", a, b)] == low
    by = torch.arange(WARP, dtype=torch.int32) + 8
    assert of("shr.s32", a, by) == [
        x >> min(n, 31) for x, n in zip(a.tolist(), range(8, 40), strict=True)
    ]
    shifted = [
        (x << n) & 0xFFFFFFFF if n < 32 else 0
        for x, n in zip(a.tolist(), range(8, 40), strict=True)
    ]
    assert [x & 0xFFFFFFFF for x in of("shl.b32", a, by)] == shifted
    start, length = torch.full((WARP,), 5).int(), torch.full((WARP,), 7).int()
    assert of("bfe.u32", a, start, length) == [(x >> 5) & 127 for x in a.tolist()]
    signed = [((x >> 5) & 127) - 128 * ((x >> 11) & 1) for x in a.tolist()]
    assert of("bfe.s32", a, start, length) == signed
    most = max(a.tolist())
    assert of("redux.sync.max.s32", a, torch.full((WARP,), -1).int()) == [most] * WARP


def test_numbers_that_are_none() -> None:
    """Comparisons of NaN, by both kinds; the larger of NaN and a number is the number."""
    nan = torch.full((WARP,), math.nan)
    one = torch.ones(WARP)
    assert torch.equal(applied("max.f32", "rrr", nan, one, out=torch.float32), one)
    for name, expected in {"lt": 0, "ltu": 1, "ge": 0, "geu": 1, "num": 0, "nan": 1, "neu": 1,
                           "eq": 0}.items():  # fmt: skip
        made = torch.empty(WARP, dtype=torch.int32)
        run(
            f"""mul.wide.u32 %rd9, %r1, 4;
            add.s64 %rd8, %rd9, %rd2;
            add.s64 %rd9, %rd9, %rd1;
            ld.global.b32 {{ %r2 }}, [ %rd8 + 0 ];
            setp.{name}.f32 %p1, %r2, 0f3F800000;
            selp.b32 %r3, 1, 0, %p1;
            st.global.b32 [ %rd9 + 0 ], {{ %r3 }};""",
            made,
            nan,
        )
        assert made.tolist() == [expected] * WARP, name


def test_what_is_approximate_errs() -> None:
    """By no more than the manual allows, and for some of 32 numbers by something."""
    a, b = spread(torch.float32, 5).abs(), spread(torch.float32, 6).abs()
    for name, kinds, given, exact, most in (
        ("div.full.f32", "rrr", (a, b), a.double() / b.double(), 2),
        ("sqrt.approx.ftz.f32", "rr", (a,), a.double().sqrt(), 1),
        ("ex2.approx.f32", "rr", (a / 99,), (a / 99).double().exp2(), 2),
    ):
        made = applied(name, kinds, *given, out=torch.float32)
        places = (made.double() - exact).abs() / torch.from_numpy(np.spacing(exact.float().numpy()))
        assert 0.6 < places.max() <= most + 0.5, name


SHARED = """
    mul.lo.s32 %r2, %r1, 4;
    mul.wide.u32 %rd9, %r1, 4;
    add.s64 %rd9, %rd9, %rd1;
    xor.b32 %r3, %r1, 32;
    mul.lo.s32 %r3, %r3, 4;
"""


def test_matrices_go_where_the_manual_says() -> None:
    """Lane l holds values 2 (l % 4) and the next of row l / 4; transposed, of column l / 4."""
    lanes = np.arange(WARP)
    held = (lanes * 2) | ((lanes * 2 + 1) << 16)
    for how, rows, columns in (
        ("", lanes // 4, lanes % 4 * 2), (".trans", lanes % 4 * 2, lanes // 4)
    ):  # fmt: skip
        made = torch.zeros(WARP, dtype=torch.int32)
        back = torch.zeros(WARP, dtype=torch.int32)
        run(
            f"""{SHARED}
            add.s64 %rd8, %rd2, 0;
            mul.wide.u32 %rd7, %r1, 4;
            add.s64 %rd8, %rd8, %rd7;
            shl.b32 %r4, %r1, 1;
            shl.b32 %r5, %r1, 17;
            add.s32 %r5, %r5, 65536;
            or.b32 %r4, %r4, %r5;
            and.b32 %r6, %r1, 7;
            shl.b32 %r6, %r6, 4;
            stmatrix.sync.aligned.m8n8.x1{how}.shared.b16 [%r6], {{%r4}};
            bar.sync 0;
            ld.shared.b32 %r7, [%r2];
            st.global.b32 [ %rd9 + 0 ], {{ %r7 }};
            ldmatrix.sync.aligned.m8n8.x1{how}.shared.b16 {{%r8}}, [%r6];
            st.global.b32 [ %rd8 + 0 ], {{ %r8 }};""",
            made,
            back,
        )
        expected = np.zeros((8, 8), np.uint16)
        step = (1, 0) if how else (0, 1)
        expected[rows, columns] = held & 0xFFFF
        expected[rows + step[0], columns + step[1]] = held >> 16
        assert np.array_equal(made.numpy().view(np.uint16).reshape(8, 8), expected)
        assert np.array_equal(back.numpy(), held)


def test_lanes_and_branches() -> None:
    """Those that part join again, after loops of as many turns as each takes."""
    made = torch.zeros(64, dtype=torch.int32)
    run(
        f"""{SHARED}
        mov.b32 %r4, 0;
        mov.b32 %r5, %r1;
        $L__BB0_1:
        add.s32 %r4, %r4, %r5;
        add.s32 %r5, %r5, -1;
        setp.gt.s32 %p1, %r5, 0;
        @%p1 bra $L__BB0_1;
        shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1;
        st.global.b32 [ %rd9 + 0 ], {{ %r6 }};""",
        made,
        threads=64,
    )
    sums = [max(n * (n + 1) // 2, 0) for n in range(64)]
    assert made.tolist() == [sums[n ^ 1] for n in range(64)]


STRICT = {
    "no barrier": ("reads what another warp wrote", """
        st.shared.b32 [%r2], %r1;
        ld.shared.b32 %r4, [%r3];"""),
    "no barrier before it is overwritten": ("writes what another warp read", """
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        ld.shared.b32 %r4, [%r3];
        add.s32 %r4, %r4, 7;
        st.shared.b32 [%r2], %r4;"""),
    "two warps, one place": ("another warp wrote|different values", """
        mov.b32 %r4, 0;
        st.shared.b32 [%r4], %r1;"""),
    "a copy that nobody waits for": ("a copy that was not waited for", """
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd9 + 0 ], 0x4;
        cp.async.commit_group;
        bar.sync 0;
        ld.shared.b32 %r4, [%r2];"""),
    "one group too few": ("a copy that was not waited for", """
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd9 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r4, [%r2];"""),
    "a copy of another warp": ("reads what another warp wrote", """
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd9 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r3];"""),
    "beyond a tensor": ("outside of all memory", "ld.global.b32 { %r4 }, [ %rd9 + 4 ];"),
    "beyond shared memory": ("outside of the 4096 bytes", "ld.shared.b32 %r4, [%r2+4000];"),
    "an odd address": ("no multiple", "ld.global.v2.b32 { %r4, %r5 }, [ %rd9 + 0 ];"),
    "threads, one place": ("different values to one place", """
        st.global.b32 [ %rd1 + 0 ], { %r1 };"""),
    "half of a warp": ("reads a lane that is not there", """
        setp.lt.s32 %p1, %r1, 16;
        @%p1 shfl.sync.bfly.b32 %r4, %r1, 16, 31, -1;"""),
    "half of a program": ("not all threads of a program", """
        setp.lt.s32 %p1, %r1, 32;
        @%p1 bra $L__BB0_1;
        bar.sync 0;
        $L__BB0_1:"""),
    "what is not known": ("not known: frobnicate", "frobnicate.b32 %r4, %r1;"),
    "a mode that is not known": ("not known: cvt.rn.relu", "cvt.rn.relu.bf16.f32 %rs1, %r1;"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICT)
def test_what_a_gpu_would_not_tell(case: str) -> None:
    said, body = STRICT[case]
    with pytest.raises(ptx.PtxError, match=said):
        run(SHARED + body, torch.zeros(64, dtype=torch.int32), threads=64)


def test_what_is_right_is_not_told() -> None:
    """The same with what it lacked."""
    x, made = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(
        f"""{SHARED}
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd9 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.b32 %r4, [%r3];
        bar.sync 0;
        st.shared::cta.b32 [%r2], %r4;
        bar.sync 0;
        ld.shared.b32 %r4, [%r3];
        add.s64 %rd8, %rd9, 0;
        sub.s64 %rd8, %rd8, %rd1;
        add.s64 %rd8, %rd8, %rd2;
        st.global.b32 [ %rd8 + 0 ], {{ %r4 }};""",
        x,
        made,
        threads=64,
    )
    assert torch.equal(made, x)


@pytest.mark.parametrize("reads", [False, True])
def test_programs_share_no_memory_that_one_writes(reads: bool) -> None:
    access = "ld.global.b32 { %r4 }, [ %rd1 + 0 ];" if reads else ""
    with pytest.raises(ptx.PtxError, match=r"another program|different values"):
        run(
            f"""{SHARED}
            {access}
            mov.u32 %r5, %ctaid.x;
            add.s32 %r5, %r5, 1;
            setp.eq.b32 %p1, %r1, 0;
            @%p1 st.global.b32 [ %rd1 + 0 ], {{ %r5 }};""",
            torch.zeros(64, dtype=torch.int32),
            programs=2,
        )


def test_a_product_and_a_sum_may_be_fused() -> None:
    """As an assembler may; not where the product was overwritten, nor after a label."""

    def of(body: str) -> float:
        made = torch.zeros(1)
        run(
            f"""mov.b32 %r2, 0f3F800001;
            mul.f32 %r3, %r2, %r2;
            {body}
            setp.eq.b32 %p1, %r1, 0;
            @%p1 st.global.b32 [ %rd1 + 0 ], {{ %r4 }};""",
            made,
        )
        return made.item()

    factor = struct.unpack("<f", struct.pack("<I", 0x3F800001))[0]
    lost = factor * factor - float(np.float32(factor * factor))
    assert lost > 0
    # 1.0000002384...
    rounded = "0f3F800002"
    assert of(f"sub.f32 %r4, %r3, {rounded};") == lost
    assert of(f"sub.f32 %r4, {rounded}, %r3;") == -lost
    assert of(f"neg.f32 %r5, {rounded};\nadd.f32 %r4, %r5, %r3;") == lost
    assert of(f"mov.b32 %r2, 0f40000000;\nsub.f32 %r4, %r3, {rounded};") == 0
    assert of(f"bra $L__BB0_1;\n$L__BB0_1:\nsub.f32 %r4, %r3, {rounded};") == 0
