"""What every kernel is made of: where a tile lies in memory, and sums over it.

A tensor is cut into units, runs of memory whose values share one statistic or one channel: a row
of a layer norm, a channel of a sample, a channel over the batch. A tile holds some units by some
values of each. Where channels are outside, unit u begins at u · K and its values follow one
another; where they are inside (COLUMNS), it begins at its channel in its sample and its values are
C apart.
With several runs (R > 1: a channel over the batch) the next run is run_stride further.

Arguments: p_ pointers read, o_ pointers written; what is in capitals and not a size is fixed when
the kernel is compiled. Triton compiles a kernel anew for a size of 1 or one that 16 divides, and
the order of its sums may change with that: a size that follows the number of samples is never
specialized.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import ELU, GELU_TANH, act, act_gradient

# what a mask has a value for: a unit; a place among a sample's values, where a tile holds units of
# one sample alone; the same, where it holds those of several
BY_UNIT = tl.constexpr(1)
SHARED = tl.constexpr(2)
BY_SAMPLE = tl.constexpr(3)

# whose parameters are those of a part of the samples: units' own, or a row's values'
OF_UNITS = tl.constexpr(1)
OF_ROWS = tl.constexpr(2)

# where x lies: its features outside of the positions, or its rows apart, and all else in rows
TURNED = tl.constexpr(1)
STRIDED = tl.constexpr(2)

# that 1 + weight is what is meant by weight
ONE_PLUS = tl.constexpr(2)


@triton.jit
def as_float64(bits):
    """The float64 with these bits: Triton passes a float as float32, which has no eps of 1e-65."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def narrow(value, TYPE: tl.constexpr):
    """Rounded to TYPE; float64 to half precision by way of float32, as the hardware does."""
    if TYPE == tl.float64:
        return value.to(tl.float64)
    return value.to(tl.float32).to(TYPE)


@triton.jit
def split_program(unit_blocks, chunks, CHUNKS_FIRST: tl.constexpr, BACKWARDS: tl.constexpr):
    """(block of units, chunk) of this program, in the order of memory.

    Backwards, a second pass begins with what the first has left in the cache.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    if CHUNKS_FIRST:
        return program // chunks, program % chunks
    return program % unit_blocks, program // unit_blocks


@triton.jit
def tile_units(
    block, U, C, K, R, run_stride, units, part, BU: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr, PARTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(units of a tile, which of them there are, their channels, samples, where they begin).

    Grouped, a tile holds the `units` of one statistic, else BU of them. Where channels are inside,
    it holds those of one sample: u // C and u % C would hide from the compiler that they are
    neighbours, and with it how it lays out threads, which sets the order of sums. Where every
    `part` rows have parameters of their own, it holds those of one part, which is their sample.
    """
    lane = tl.arange(0, BU)
    # in the interpreter the block of a loop is a plain integer
    block = tl.zeros((), INDEX) + block
    if GROUPED:
        width = units
    else:
        width = BU
    if COLUMNS:
        blocks = (C + width - 1) // width
        sample, c = block // blocks, (block % blocks) * width + lane
        u, begin, there = sample * C + c, sample * C * K + c, c < C
    elif PARTED == OF_ROWS:
        blocks = (part + width - 1) // width
        sample, c = block // blocks, (block % blocks) * width + lane
        u, there = sample * part + c, c < part
        begin = u * K
    else:
        u = block * width + lane
        sample, c, begin, there = u // C, u % C, u * K, u < U
        if PARTED:
            # samples of several runs each, the batch norm's of a part
            begin += sample * ((R - 1) * run_stride)
    if GROUPED:
        there &= lane < units
    return u, there, c, sample, begin


@triton.jit
def tile_offsets(begin, inside, NEIGHBOURS: tl.constexpr):
    """Where the values of a tile's units lie.

    NEIGHBOURS: how many units that follow one another in memory a thread takes at most, where not
    all that it can load at once: it works out the statistics of each, as do others that share them.
    """
    offsets = begin[:, None] + inside[None, :]
    if NEIGHBOURS > 0 and begin.shape[0] > NEIGHBOURS:
        offsets = tl.max_contiguous(offsets, [NEIGHBOURS, 1])
    return offsets


@triton.jit
def parameters_of_units(c, sample, C, part, PARTED: tl.constexpr):
    """Where the parameters of units are."""
    # one return: Triton wants a single type of all that it meets
    place = c
    if PARTED == OF_UNITS:
        place = sample // part * C + c
    return place


@triton.jit
def parameters_of_values(k, sample, K, PARTED: tl.constexpr):
    """Where the parameters of values are."""
    place = k
    if PARTED == OF_ROWS:
        place = sample * K + k
    return place


@triton.jit
def statistic_of(u, units, S, PARTED: tl.constexpr):
    """Of every `units` units one; of a batch in parts, one for the same channel of them all."""
    statistic = u // units
    if PARTED == OF_UNITS:
        statistic = statistic % S
    return statistic


@triton.jit
def row_starts(u, inner, innermost, step, inner_step, innermost_step):
    """Where rows of three dimensions begin. Steps are in sixteen values: what is compiled is then
    as well aligned as for rows that follow one another.
    """
    outer = u // innermost
    start = outer // inner * step + outer % inner * inner_step + u % innermost * innermost_step
    return start * 16


@triton.jit
def placed(
    offsets, u, k, K, inner, innermost, step_0, step_1, step_2, PLACED: tl.constexpr
):  # fmt: skip
    """Where a tile of x lies, and where one of all else does; offsets: both, where x is in rows."""
    x_offsets = offsets
    if PLACED == TURNED:
        offsets = (u * K)[:, None] + k[None, :]
    if PLACED == STRIDED:
        start = row_starts(u, inner, innermost, step_0, step_1, step_2)
        x_offsets = start[:, None] + k[None, :]
    return x_offsets, offsets


@triton.jit
def value_offsets(k, C, COLUMNS: tl.constexpr):
    if COLUMNS:
        return k * C
    return k


@triton.jit
def chunk_bounds(chunk, K, R, k_chunks, k_chunk, r_chunk):
    """The runs and the values of each that a chunk spans."""
    r0 = (chunk // k_chunks) * r_chunk
    k0 = (chunk % k_chunks) * k_chunk
    return r0, tl.minimum(r0 + r_chunk, R), k0, tl.minimum(k0 + k_chunk, K)


@triton.jit
def next_tile(r, start, k0, k1, BK: tl.constexpr):
    """(run, first value) of the tile after this one."""
    start += BK
    over = start >= k1
    return r + over.to(r.dtype), tl.where(over, k0, start)


@triton.jit
def valid_tile(
    p_mask, u, in_unit, sample, at, in_value, places, MASK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(what there is of a tile, what of it is valid); at: the places of its values in a sample, of
    so many.
    """
    there = in_unit[:, None] & in_value[None, :]
    if MASK == BY_UNIT:
        return there, there & (tl.load(p_mask + u, mask=in_unit, other=0) != 0)[:, None]
    if MASK == SHARED:
        if COLUMNS:
            at = at + sample * places
        return there, there & (tl.load(p_mask + at, mask=in_value, other=0) != 0)[None, :]
    if MASK == BY_SAMPLE:
        where = (sample * places)[:, None] + at[None, :]
        return there, there & (tl.load(p_mask + where, mask=there, other=0) != 0)
    return there, there


@triton.jit
def load_tile(p, offsets, there, valid, MASK: tl.constexpr, TYPE: tl.constexpr):
    """A tile of x; what is not valid is 0, whatever stands there.

    It is read all the same: a load under a mask that follows no size is made value by value.
    """
    values = tl.load(p + offsets, mask=there, other=0).to(TYPE)
    if MASK:
        values = tl.where(valid, values, 0.0)
    return values


@triton.jit
def rounded(value, TYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """To TYPE, where each step is."""
    if ROUNDS:
        return narrow(value, TYPE).to(value.dtype)
    return value


@triton.jit
def affine_tile(x_hat, weight, bias, TYPE: tl.constexpr, ROUNDS: tl.constexpr):
    if ROUNDS:
        z = rounded(rounded(x_hat, TYPE, True) * weight, TYPE, True)
        return rounded(z + bias, TYPE, True)
    return x_hat * weight + bias


@triton.jit
def finish_tile(
    z, p_residual, o_y, offsets, there, valid, parameter_bits, padding_bits,
    MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """What comes after the affine step: y = act(z + residual), or padding, stored."""
    TYPE: tl.constexpr = o_y.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(p_residual + offsets, mask=there, other=0).to(z.dtype)
        z = rounded(z + residual, TYPE, ROUNDS)
    if ACT:
        if ACT >= ELU and ACT <= GELU_TANH and TYPE.primitive_bitwidth == 16:
            # no difference cancels from here on
            z = z.to(tl.float32)
        parameter = 0.0
        if parameter_bits is not None:
            parameter = as_float64(parameter_bits).to(z.dtype)
        z = act(z, parameter, ACT)
    if MASK:
        z = tl.where(valid, z, as_float64(padding_bits).to(z.dtype))
    tl.store(o_y + offsets, narrow(z, TYPE), mask=there)


@triton.jit
def gradient_tile(
    z, p_grad, p_residual, offsets, there, valid, parameter_bits,
    MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BY_OUTPUT: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of z + residual, from that of y; z is made again from x."""
    g = tl.load(p_grad + offsets, mask=there, other=0).to(TYPE)
    if ACT:
        if HAS_RESIDUAL:
            residual = tl.load(p_residual + offsets, mask=there, other=0).to(TYPE)
            if BY_OUTPUT:
                z = residual
            else:
                z = rounded(z + residual, p_grad.dtype.element_ty, ROUNDS)
        parameter = 0.0
        if parameter_bits is not None:
            parameter = as_float64(parameter_bits).to(TYPE)
        g = act_gradient(g, z, parameter, ACT)
    if MASK or ACT:
        # beyond a tile's end z is of no value, and may be NaN
        g = tl.where(valid, g, 0.0)
    return g


@triton.jit
def optional(p, at, mask, HAS: tl.constexpr, DEFAULT: tl.constexpr, TYPE: tl.constexpr):
    """A vector of a parameter, or of what stands in for it."""
    if HAS == ONE_PLUS:
        return tl.load(p + at, mask=mask, other=0).to(TYPE) + 1.0
    if HAS:
        return tl.load(p + at, mask=mask, other=0).to(TYPE)
    return tl.full(at.shape, DEFAULT, TYPE)


@triton.jit
def one_over_std(var, eps_bits):
    return tl.rsqrt(var + as_float64(eps_bits))


@triton.jit
def statistics(p_mean, p_var, at, mask, eps_bits):
    """Mean and 1 / std in float64."""
    mean = tl.load(p_mean + at, mask=mask, other=0).to(tl.float64)
    var = tl.load(p_var + at, mask=mask, other=1).to(tl.float64)
    return mean, one_over_std(var, eps_bits)


@triton.jit
def two_floats(value, TYPE: tl.constexpr):
    """A float64 as the sum of two numbers of TYPE."""
    high = value.to(TYPE)
    return high, (value - high.to(tl.float64)).to(TYPE)


@triton.jit
def summed(values, AXIS: tl.constexpr):
    """Sums of a tile along an axis, the same for all lanes that share one.

    Where a lane has one value of a sum, a compiler fuses the product that this may be into the sum
    with another lane's, which fuses its own: two results of one sum. It does not fuse twice.
    """
    if values.shape[AXIS] > 1 and values.shape[AXIS] <= 128:
        values += 0.0
    return tl.sum(values, AXIS)


@triton.jit
def partly_summed(values, AXIS: tl.constexpr, KEPT: tl.constexpr):
    """Sums of every KEPT-th row of a tile, or value of a row: KEPT times as many, for which threads
    that hold so many at once need not meet.
    """
    N: tl.constexpr = values.shape[AXIS]
    if N > KEPT:
        if AXIS == 0:
            values = tl.reshape(values, (N // KEPT, KEPT, values.shape[1]))
        else:
            values = tl.reshape(values, (values.shape[0], N // KEPT, KEPT))
        if values.dtype.is_floating():
            values = summed(values, AXIS)
        else:
            values = tl.sum(values, AXIS)
    return values


@triton.jit
def squares(values, AXIS: tl.constexpr):
    """To be summed along an axis; of a square a compiler knows that adding zero changes nothing."""
    if values.shape[AXIS] <= 128:
        return tl.fma(values, values, tl.zeros_like(values))
    return values * values


@triton.jit
def per_statistic(values, GROUPED: tl.constexpr):
    """Sums of a tile by statistic, one for each unit; grouped, the units share theirs."""
    sums = summed(values, 1)
    if GROUPED:
        sums = summed(sums, 0) + tl.zeros_like(sums)
    return sums
