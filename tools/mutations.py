"""What tools/mutate.py breaks: one piece of csrc/ each, and the tests that must notice it."""

from __future__ import annotations

from typing import NamedTuple

PROMISES = ("tests/test_kernels.py", "tests/test_half.py")
FUSED = ("tests/test_fused.py",)
CALLS = ("tests/test_norm_operator.py",)
DIGEST = ("tests/test_instruction_sets.py",)
STEPS = ("tests/test_rounding.py",)
PARTS = ("tests/test_parts.py",)
ADDED = ("tests/test_added.py",)
TURNED = ("tests/test_turned.py",)
GATED = ("tests/test_gated.py",)
AT_ONCE = ("tests/test_rules_at_once.py",)
RULES = ("tests/test_rules.py",)
SHORT = ("tests/test_short_runs.py",)


class Mutation(NamedTuple):
    """What is broken, where, and how.

    `old` stands in `file` as many times as `times` says, and `new` takes its place. Of `tests` one
    that `select` picks (pytest's -k) must fail: on the machine's best instruction set, or, in a
    library built of `sets`, on the first of them.
    """

    promise: str
    file: str
    old: str
    new: str
    select: str
    sets: tuple[str, ...] = ()
    tests: tuple[str, ...] = PROMISES
    times: int = 1


MUTATIONS = [
    Mutation(
        "1 sums about zero instead of about a value of the row",
        "kernel_moments.h",
        "const vd shift = splat<vd>(to_double(origin));",
        "const vd shift = splat<vd>(0.0 * to_double(origin));",
        "offsets",
    ),
    Mutation(
        "1 sums about zero at any offset",
        "kernel_moments.h",
        "kFarOff = 0x1p10;",
        "kFarOff = 0x1p200;",
        "offsets",
    ),
    Mutation(
        "1 the mean as one float",
        "coefficients.h",
        "bias - (mean - double(hi)) * slope;",
        "bias - 0.0 * (mean - double(hi)) * slope;",
        "offsets",
    ),
    Mutation(
        "1 one-pass column moments",
        "kernel_moments.h",
        "shift[v] = Lane<T>::load_double(x + v * D);",
        "shift[v] = vd{} * Lane<T>::load_double(x + v * D);",
        "offsets or formats",
    ),
    Mutation(
        "1 the unbiased variance",
        "layers.h",
        "(m.m2 + of_mean) / m.count : 0.0;",
        "(m.m2 + of_mean) / (m.count - 1.0) : 0.0;",
        "formats",
    ),
    Mutation(
        "1 the gradient without its x̂ term",
        "coefficients.h",
        "slope(A(-rstd * mean_grad_x_hat))",
        "slope(A(0.0 * mean_grad_x_hat))",
        "formats",
    ),
    Mutation(
        "1 the output gradient read in its own memory format",
        "tensors.h",
        "return laid_out(grad.scalar_type() == type ? grad : torch::stable::to(grad, type), g);",
        "return grad.scalar_type() == type ? grad : torch::stable::to(grad, type);",
        "formats",
    ),
    Mutation(
        "1 positions left over by folding are forgotten",
        "channels_forward.cpp",
        "cut.columns_of(c, cut.left_over,",
        "cut.columns_of(c, cut.left_over - 1,",
        "formats",
    ),
    Mutation(
        "2 1/std and its slope as one float32 number",
        "kernel_input_gradients.h",
        "return grad * scale + ((x - hi) * rstd * slope + shift);",
        "return grad * scale + ((x - hi) * (rstd * slope) + shift);",
        "scales",
    ),
    Mutation(
        "3 half precision with coefficients of one float, where parts of it cancel",
        "kernel_elementwise.h",
        "y.v[k] + fused(d.v[k], scale_rest[k], shift_rest[k]);",
        "y.v[k];",
        "cancel",
    ),
    Mutation(
        "3 half precision with x̂ as one float, where it and the bias cancel",
        "kernel_elementwise.h",
        "fused(weight, rest, fused(weight, near, load_raw<vf>(biases + at)));",
        "weight * (near + rest) + load_raw<vf>(biases + at);",
        "cancel",
    ),
    Mutation(
        "3 an infinite value that becomes NaN in half precision",
        "kernel_elementwise.h",
        "out.v[k] = out.v[k] == out.v[k] ? out.v[k] : y.v[k];",
        "out.v[k] = out.v[k];",
        "infinite",
    ),
    Mutation(
        "3 bfloat16 by truncation",
        "simd_vectors.h",
        "return bits + 0x7fffu + (bits >> 16 & 1u);",
        "return bits;",
        "formats",
    ),
    Mutation(
        "4 a fused operation that is none, where the processor has none",
        "simd_vectors.h",
        "(inexact & even & ((away & 2) - 1))",
        "(inexact & even & 0)",
        "rounded_together",
        sets=("baseline",),
    ),
    Mutation(
        "4 a sum half way between two floats that is rounded twice, where nothing is fused",
        "simd_vectors.h",
        "return half_way | small;",
        "return small;",
        "rounded_together",
        sets=("baseline",),
    ),
    Mutation(
        "4 a sum below the normal floats that is rounded twice, where nothing is fused",
        "simd_vectors.h",
        "return half_way | small;",
        "return half_way;",
        "rounded_together",
        sets=("baseline",),
    ),
    Mutation(
        "1 a channel read once over the batch: not its first sample",
        "rows_forward.cpp",
        "for (int64_t n = g.n - 1; n >= 0; --n) apply",
        "for (int64_t n = g.n - 1; n > 0; --n) apply",
        "formats",
    ),
    Mutation(
        "4 pieces cut by the number of threads",
        "rows_forward.cpp",
        "const int64_t pieces = ceil_div(len, kPiece);\n",
        "const int64_t kPiece = 20000 / int64_t(torch::stable::get_num_threads());\n"
        "  const int64_t pieces = ceil_div(len, kPiece);\n",
        "threads",
    ),
    Mutation(
        "4 cut by the batch",
        "channels.h",
        "rows_per_piece = std::max(kMinRows, kPiece / cols);",
        "rows_per_piece = std::max<int64_t>(2, kMinRows / g.n);",
        "batch or among",
    ),
    Mutation(
        "1 the last values of a run counted twice",
        "kernel_moments.h",
        "return unread<P>(v, start, k, int(i + kStep - len), unread_value);",
        "return v;",
        "formats",
    ),
    Mutation(
        "1 padding that is counted",
        "kernel_moments.h",
        "const V unread_value = splat<V>(compute_t<T>(to_double(origin)));",
        "const V unread_value = splat<V>(compute_t<T>(to_double(origin) + 1.0));",
        "formats",
    ),
    Mutation(
        "4 a last cut of columns so narrow that it is summed in another way",
        "rows_elementwise.cpp",
        "std::max<int64_t>(1, len / width);",
        "ceil_div(len, width);",
        "threads",
    ),
    Mutation(
        "3 the lines at the edges of what goes past the caches",
        "kernel_map.h",
        "std::memcpy(out, made[0].values, size_t(begin) * sizeof(T));",
        "std::memcpy(out, made[0].values, size_t(begin / 2) * sizeof(T));",
        "past_the_caches",
    ),
    Mutation(
        "1 local response: the window that a gradient reaches, mirrored",
        "kernel_local_response.h",
        "of_across.run[j] = across + j - after;",
        "of_across.run[j] = across + j - before;",
        "formats",
    ),
    Mutation(
        "2 local response in float32 at any scale",
        "kernel_local_response.h",
        "p.value = (vf)((vi)p.value | outside);",
        "p.value = (vf)((vi)p.value | (outside & 0));",
        "response",
    ),
    Mutation(
        "5 local response: a whole tile again in float64 for one of its values",
        "kernel_local_response_exact.h",
        "if (!std::isfinite(to_double(out[i + j])))",
        "if (len > 0)",
        "nan",
    ),
    Mutation(
        "fused: the residual left out",
        "kernel_activation.h",
        "if (residual) z.v[k] += residual->v[k];",
        "if (residual) z.v[k] += 0 * residual->v[k];",
        "values",
        times=2,
        tests=FUSED,
    ),
    Mutation(
        "fused: the last values of a run from another place",
        "kernel_activation.h",
        "last.values + (kStep - (len - end))",
        "last.values",
        "values",
        tests=FUSED,
    ),
    Mutation(
        "fused: ReLU's gradient everywhere",
        "kernel_activation.h",
        "return low ? below(grad) : high;",
        "return z < 0 && z > 0 ? below(grad) : high;",
        "values",
        tests=FUSED,
    ),
    Mutation(
        "fused: the output taken for the residual",
        "call.cpp",
        "act.by_output = needs & kByOutput;",
        "act.by_output = false;",
        "values",
        tests=FUSED,
    ),
    Mutation(
        "fused: in place into a copy",
        "call.cpp",
        "  torch::stable::copy_(to, y);",
        "  (void)y;",
        "in_place",
        tests=FUSED,
    ),
    Mutation(
        "call: own sums where those of the whole are given",
        "layers.h",
        "mean = mean_grad ? GradSums",
        "mean = mean_grad && !mean_grad ? GradSums",
        "part",
        tests=CALLS,
    ),
    Mutation(
        "call: statistics of its own where they are given",
        "rows_forward.cpp",
        "if (!f.fixed) {\n        Moments m;",
        "if (true) {\n        Moments m;",
        "values",
        tests=CALLS,
    ),
    Mutation(
        "call: a row that does not count, read",
        "rows_elementwise.cpp",
        "if (valid[j]) body(j, 1);",
        "body(j, 1);",
        "values",
        tests=CALLS,
    ),
    Mutation(
        "parts: the first one's weight for all",
        "layers.h",
        "past(weight, k * of.c)",
        "weight",
        "formula",
        tests=PARTS,
        times=2,
    ),
    Mutation(
        "sum: its own gradient forgotten",
        "eager.cpp",
        "use.add(to + at, values_of<T>(of_h) + at, to + at, some.numel(), stream);",
        "",
        "addition",
        tests=ADDED,
    ),
    Mutation(
        "call: what an activation makes of what is not valid",
        "masked_rows.cpp",
        "f.kernels.clear(f.y + offset, mask, runs, len, f.padding);",
        "",
        "values",
        tests=CALLS,
    ),
    Mutation(
        "steps: x̂ that is not rounded before the weight",
        "kernel_elementwise.h",
        "V y = rounded<T>(x_hat);",
        "V y = x_hat;",
        "operator_of_the_dtype",
        tests=STEPS,
    ),
    Mutation(
        "steps: weights in the backward without their one",
        "call.cpp",
        "weight(c.weight, c.one_plus), bias(c.bias);\n    const Backward",
        "weight(c.weight), bias(c.bias);\n    const Backward",
        "one_plus",
        tests=STEPS,
    ),
    Mutation(
        "4 AVX2: a product and a sum that are rounded one after the other",
        "simd_vectors.h",
        "return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);",
        "return a * b + c;",
        "same_bits",
        sets=("avx2", "avx512"),
        tests=DIGEST,
    ),
    Mutation(
        "4 baseline: a tie of float16 rounded upwards",
        "simd_vectors.h",
        "(bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13",
        "(bits + 0x1000u - 0x38000000u) >> 13",
        "same_bits",
        sets=("baseline", "avx512"),
        tests=DIGEST,
    ),
    Mutation(
        "4 baseline: what is not finite goes unseen",
        "simd_vectors.h",
        "_mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0",
        "_mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) > 15",
        "same_bits",
        sets=("baseline", "avx512"),
        tests=DIGEST,
    ),
    Mutation(
        "turned: a square's halves change places",
        "kernel_turn.h",
        "first = Second * lanes / 2;",
        "first = (1 - Second) * lanes / 2;",
        "by_formula or other_layout",
        tests=TURNED,
    ),
    Mutation(
        "turned: the sums of the first tiles for those of all",
        "turned.cpp",
        "b.sums[c].add(sums[task * g.c + c]);",
        "b.sums[c].add(sums[0 * task + c]);",
        "by_formula",
        tests=TURNED,
    ),
    Mutation(
        "turned: the mask of the first rows for each tile's",
        "turned.cpp",
        "part.rows = past(f.rows, tile.row);",
        "part.rows = f.rows;",
        "do_not_count",
        tests=TURNED,
    ),
    Mutation(
        "gathered: each sample's run over the first one's",
        "rows_gathered.cpp",
        "at += sample, to += g.s)",
        "at += sample, to += 0 * g.s)",
        "by_formula",
        tests=SHORT,
    ),
    Mutation(
        "a gate's slope without what it multiplies",
        "kernel_gate.h",
        "return swish ? sigma.value + g * slope : slope;",
        "return swish ? sigma.value : slope;",
        "formula",
        tests=GATED,
    ),
    Mutation(
        "a gated product that is rounded once where each step is",
        "gated.cpp",
        "const bool later = is_half<T> && rounds.x_hat;",
        "const bool later = false;",
        "rounded_once",
        tests=GATED,
    ),
    Mutation(
        "a gated norm's rows read as if they were side by side",
        "gated.cpp",
        "apart(steps_of(held))",
        "apart(held.size(held.dim() - 1))",
        "strided",
        tests=GATED,
    ),
    Mutation(
        "a bias's gradient left out with the mean's",
        "rows_elementwise.cpp",
        "b_.about_zero() && !b_.of_bias ?",
        "b_.about_zero() ?",
        "no_one_asks",
        tests=AT_ONCE,
    ),
    Mutation(
        "a step rounded to a bit less than bfloat16 has",
        "kernel_elementwise.h",
        "(round_to_bf16<vu>(v) & 0xffff0000u)",
        "(round_to_bf16<vu>(v) & 0xfffe0000u)",
        "same_numbers",
        tests=RULES,
    ),
    Mutation(
        "groups of trailing dimensions taken for one",
        "call.h",
        "? std::max<int64_t>(num_groups(), 1)",
        "? 1",
        "groups_of_trailing",
        tests=AT_ONCE,
    ),
    Mutation(
        "a norm of channels that is not rounded before its activation",
        "kernel_activation.h",
        "  z = rounded<T>(z);",
        "  ;",
        "one_operator_before",
        tests=STEPS,
    ),
]
