"""Launch choices, from shape and dtype alone.

They never look at the number of samples where a sample has statistics of its own: the order of its
sums, and so its bits, must not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Launch:
    """A tile of `units` by `values`, both powers of two, and the warps that share it."""

    units: int
    values: int
    warps: int


@dataclass(frozen=True)
class Limits:
    """What bounds a tile; LIMITS holds those in force.

    forward, backward: most bytes, in the type computed in, of a tile that holds whole statistics.
    tile: bytes of a tile otherwise.
    per_thread: bytes of a tile that one thread holds of each tensor.
    sector: bytes that memory moves at once, which neighbouring channels of a tile fill, where
        channels are inside.
    steps, few_steps: most tiles that a program walks over where a statistic is cut into chunks, and
        most where a sample has few. No sum in float32 is longer, and a chunk of moments that starts
        far from its mean loses no more digits.
    ahead: most bytes of tiles that are read ahead; compute capability 8.6 has 99 KiB a program.
    programs: so many that a sample is better cut into than not, four for each multiprocessor.
    blocks_per_program: blocks of rows of a layer norm that a program adds up at most.
    """

    forward: int = 65536
    backward: int = 32768
    tile: int = 8192
    per_thread: int = 64
    sector: int = 32
    steps: int = 16
    few_steps: int = 4
    ahead: int = 65536
    programs: int = 512
    blocks_per_program: int = 64


LIMITS = Limits()
MAX_WARPS = 16
# of a pipeline: what is read ahead is one tile less
STAGES = 2
# the same, where tiles are small in memory: of half precision's moments
STAGES_OF_SMALL = 4


class Key(NamedTuple):
    """What a tile is chosen for: `whole` statistics, or to walk over units with; see below."""

    whole: bool
    values: int
    units: int
    columns: bool
    grouped: bool
    width: int
    backward: bool


# truenorm.tune's
CHOSEN: dict[Key, Launch] = {}
_asked: dict[Key, Launch] | None = None
# what calls come to (_core/planned.py), by the choices in force: emptied where these change
CALLS: dict[Any, Any] = {}


@contextmanager
def asked() -> Iterator[dict[Key, Launch]]:
    """What is chosen while this is open."""
    global _asked
    _asked = {}
    CALLS.clear()
    try:
        yield _asked
    finally:
        _asked = None


def choose(key: Key, launch: Launch | None) -> None:
    """None: as without truenorm.tune."""
    if launch is None:
        CHOSEN.pop(key, None)
    else:
        CHOSEN[key] = launch
    CALLS.clear()


def _choose(key: Key, launch: Launch) -> Launch:
    chosen = CHOSEN.get(key, launch)
    if _asked is not None:
        _asked[key] = chosen
    return chosen


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _warps(size: int) -> int:
    """For a tile of that many bytes."""
    return max(1, min(MAX_WARPS, size // (32 * LIMITS.per_thread)))


def whole(
    values: int,
    units: int,
    *,
    columns: bool,
    grouped: bool,
    width: int,
    backward: bool,
    half: bool = False,
    turns: bool = False,
    crowded: bool = False,
) -> Launch | None:
    """A tile of whole statistics, or None where they do not fit.

    values: of a unit. units: that share a statistic if grouped, else neighbours in memory.
    width: bytes of the compute type. half: whether memory holds half of them. turns: whether a
    program goes on to other units. crowded: whether what else is made of a tile than the norm takes
    registers that a large one does not leave.
    """
    wide = power_of_two(values)
    limit = LIMITS.backward if backward else LIMITS.forward
    if crowded:
        limit //= 2
    if grouped:
        tall = power_of_two(units)
    else:
        # one that goes on may be as small as a warp
        size = LIMITS.tile // 4 if turns else LIMITS.tile
        tall = max(1, size // (wide * width))
        if columns:
            least = LIMITS.sector // (width // 2 if half else width)
            if half and least * wide * width > limit:
                # half a sector, rather than chunks
                least //= 2
            tall = min(max(tall, least), power_of_two(units))
    if tall * wide * width > limit:
        return None
    key = Key(True, values, units, columns, grouped, width, backward)
    size = tall * wide * width
    if half and columns:
        # a thread holds eight neighbours: the more values of each, the fewer have its statistics
        size //= 2
    return _choose(key, Launch(tall, wide, _warps(size)))


def streamed(
    values: int, units: int, *, columns: bool, width: int, doubles: bool = False
) -> Launch:
    """A tile to walk over units with. units: neighbours in memory, where channels are inside.

    doubles: whether half precision is added up in float64.
    """
    size = LIMITS.tile
    if columns:
        tall = min(64, power_of_two(units))
    else:
        if values % 16:
            # loaded value by value, which takes a register and an address each: four to a thread
            size = size * width // 16
        tall = max(1, size // (power_of_two(values) * width))
    wide = min(power_of_two(values), max(1, size // (tall * width)))
    key = Key(False, values, units, columns, False, width, False)
    warps = _warps(LIMITS.tile * tall * wide * width // size)
    if columns and doubles:
        # none that meet: sums of twice the size would take longer in shared memory than the memory
        warps = 1
    return _choose(key, Launch(tall, wide, warps))


@dataclass(frozen=True)
class Chunks:
    """How units are cut: into k_chunks of k_chunk values, and into pieces of r_chunk runs."""

    k_chunks: int
    k_chunk: int
    r_chunk: int
    count: int


def chunks(values: int, runs: int, launch: Launch, units: int = 1) -> Chunks:
    """Chunks of as many tiles as LIMITS has it. units: of a sample."""
    tiles = units * values * runs // (launch.units * launch.values)
    most = min(LIMITS.steps, max(LIMITS.few_steps, tiles // LIMITS.programs))
    k_chunk = min(values, most * launch.values)
    k_chunks = -(-values // k_chunk)
    steps = -(-k_chunk // launch.values)
    r_chunk = min(runs, max(1, most // steps))
    return Chunks(k_chunks, k_chunk, r_chunk, k_chunks * -(-runs // r_chunk))


def merge(parts: int, *, neighbours: bool) -> Launch:
    """A tile of results by their parts. neighbours: results stand beside one another in memory."""
    wide = min(power_of_two(parts), 32 if neighbours else 256)
    return Launch(max(1, 1024 // wide), wide, 4)


def at_once(launch: Launch, bytes_of_value: int, *, columns: bool) -> int:
    """How many rows of such a tile its threads hold at once, of 16 bytes each; where channels are
    inside, how many values of a unit. Each of these has sums of its own, for which no threads meet.
    """
    inside, outside = launch.values, launch.units
    if columns:
        inside, outside = outside, inside
    return max(1, min(outside, 32 * launch.warps * (16 // bytes_of_value) // inside))


def stages(launch: Launch, bytes_of_value: int) -> int:
    """Of a pipeline of such tiles, of all tensors that are read."""
    ahead = (STAGES - 1) * launch.units * launch.values * bytes_of_value
    return STAGES if ahead <= LIMITS.ahead else 1


def resident(blocks: int, launch: Launch, multiprocessors: int) -> int:
    """Programs that multiprocessors hold at a time, to go turn by turn between blocks of rows."""
    return min(blocks, multiprocessors * max(1, 1024 // (32 * launch.warps)))


def programs_of_part(blocks: int) -> int:
    """The same, of those of one part: as many whatever other parts there are."""
    return min(blocks, max(32, -(-blocks // 16)))


def programs(blocks: int, warps: int, multiprocessors: int) -> int:
    """Programs that share the blocks of rows of a layer norm's backward: as many as multiprocessors
    hold by their registers.
    """
    each = max(1, 16 // warps)
    return min(blocks, max(each * multiprocessors, -(-blocks // LIMITS.blocks_per_program)))
