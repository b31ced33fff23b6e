"""What the query-tile-major kernels share: sizes, layout in HBM, work lists, and the loop that walks a list.

All three kernels have one shape. A program owns something that stays in VMEM: a query tile (forward, dQ) or a key block
(dK, dV). It walks the list of its partners on the other side, several at a time, and adds up in VMEM. The lists of all
programs of a row of the grid (one head of one batch row) stand one behind the other in HBM, cut into *steps* that hold
up to `entries` partners of one program; a program knows the span of steps that is its own. There is no limit on the
length of a list, no step for an absent partner, and nothing as large as tiles x blocks.

`walk` hides every latency: while a step is computed, the partners of the next one are on their way to the other of two
buffers, and the ids of the one after to SMEM. The pipeline runs on from one program to the next.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.schedule import make_schedule

LANES = 128
LOG2_E = 1.4426950408889634
# The logit of a key out of sight. Finite, so that differences are; no real logit comes near it.
OUT_OF_SIGHT = -0.7 * float(jnp.finfo(jnp.float32).max)
# Position of a key that is padding: no query sees it.
NOWHERE = int(jnp.iinfo(jnp.int32).max)

NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a b^T
TN = (((0,), (0,)), ((), ()))  # a^T b

# Rows of the grid are independent; the programs of a row share a pipeline.
COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 << 20)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of the query-tile-major kernels.

    Attributes:
      largest_tile: longest query tile or key block that a program owns or loads in one piece; longer ones are cut.
      rows_per_step: keys (forward, dQ) or queries (dK, dV) that a program takes at a time.
    """

    largest_tile: int = 512
    rows_per_step: int = 1024

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 16 or size % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {name}={size}")


DEFAULT = TileConfig()


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one side is cut: tiles of `size` tokens as the caller counts, each in `parts` of `part` tokens inside."""

    size: int
    parts: int
    part: int

    @classmethod
    def of(cls, size: int, largest: int) -> "Cut":
        parts = -(-size // largest)
        return cls(size, parts, _round_up(-(-size // parts), 16))

    def split(self, array: jax.Array, fill: int = 0) -> jax.Array:
        """`[batch, tokens, heads, ...]` to `[batch * heads, tiles * parts, part, ...]`, filled up behind each tile."""
        batch, tokens, heads = array.shape[:3]
        rest = array.shape[3:]
        array = _pad(array, 1, -tokens % self.size, fill)
        array = array.reshape(batch, -1, self.size, heads, *rest)
        array = _pad(array, 2, self.parts * self.part - self.size, fill)
        array = jnp.moveaxis(array.reshape(batch, -1, self.part, heads, *rest), 3, 1)
        return array.reshape(batch * heads, -1, self.part, *rest)

    def join(self, array: jax.Array, batch: int, tokens: int) -> jax.Array:
        """Undoes `split`."""
        rest = array.shape[3:]
        array = jnp.moveaxis(array.reshape(batch, -1, *array.shape[1:]), 1, 3)  # [batch, tiles, part, heads, ...]
        heads = array.shape[3]
        array = array.reshape(batch, -1, self.parts * self.part, heads, *rest)[:, :, : self.size]
        return array.reshape(batch, -1, heads, *rest)[:, :tokens]


class Work(NamedTuple):
    """The lists of all programs of each row of the grid, cut into steps.

    Attributes:
      steps: int32 `[rows, steps, 1, 128]`: how many partners the step has, whether it needs a mask, the partners' ids.
      span: int32 `[rows, programs, 1, 3]`: first step of a program, one past its last, steps of the row in all.
    """

    steps: jax.Array
    span: jax.Array


def make_work(owner: jax.Array, partner: jax.Array, needs_mask: jax.Array, *, num_owners: int, entries: int) -> Work:
    """Sorts (owner, partner) pairs by owner and cuts each owner's run into steps of `entries` partners, order kept.

    Args:
      owner: int32 `[rows, pairs]`, the program to which a pair belongs; -1 for no pair.
      partner: int32 `[rows, pairs]`, the id that the step lists.
      needs_mask: bool `[rows, pairs]`, whether some query of the pair does not see all of the pair's keys.
      num_owners: programs in a row.
      entries: partners in a step, at most 126.
    """

    def make_row(owner: jax.Array, partner: jax.Array, needs_mask: jax.Array) -> Work:
        schedule = make_schedule(owner[:, None], num_blocks=num_owners, tile_size=entries)
        is_real = schedule.pair < owner.size  # [steps, entries]
        ids = partner.at[schedule.pair].get(mode="fill", fill_value=0)
        count = is_real.sum(1, keepdims=True)  # [steps, 1]
        is_masked = needs_mask.at[schedule.pair].get(mode="fill", fill_value=True).any(1, keepdims=True)
        steps = jnp.concatenate([count, is_masked.astype(jnp.int32), ids], axis=1).astype(jnp.int32)
        steps = jnp.pad(steps, ((0, 0), (0, LANES - steps.shape[1])))
        is_used = jnp.arange(schedule.block.size) < schedule.num_tiles
        owner_of_step = jnp.where(is_used, schedule.block, num_owners)
        bounds = jnp.searchsorted(owner_of_step, jnp.arange(num_owners + 1)).astype(jnp.int32)
        total = jnp.full(num_owners, bounds[-1])
        return Work(steps[:, None], jnp.stack([bounds[:-1], bounds[1:], total], axis=-1)[:, None])

    return jax.vmap(make_row)(owner, partner, needs_mask)


class Pairs(NamedTuple):
    """Pairs of query tile part and key block part that have something to do with each other.

    Attributes:
      tile: int32 `[batch * heads, pairs]`, -1 for a pair in which no query sees a key.
      block: int32 `[batch * heads, pairs]`.
      needs_mask: bool `[batch * heads, pairs]`.
    """

    tile: jax.Array
    block: jax.Array
    needs_mask: jax.Array


def make_pairs(blocks: jax.Array, reach: jax.Array, position: jax.Array, query_cut: Cut, key_cut: Cut) -> Pairs:
    """Lists the pairs of the selection, cut as the kernels cut them, and finds which need a mask and which are empty.

    Args:
      blocks: int32 `[batch, heads, tiles, list]`, -1 for none.
      reach: int32 `[batch, tiles * query parts, 2, part]`, first position that a query sees and one past the last.
      position: int32 `[batch * kv_heads, blocks * key parts, part]`.
    """
    batch, heads, num_tiles, _ = blocks.shape
    blocks = jnp.where(blocks < 0, -1, blocks)[..., None] * key_cut.parts
    blocks += jnp.arange(key_cut.parts, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
    blocks = jnp.repeat(jnp.maximum(blocks, -1).reshape(batch * heads, num_tiles, 1, -1), query_cut.parts, axis=2)
    blocks = blocks.reshape(batch * heads, num_tiles * query_cut.parts, -1)  # [batch * heads, tiles, list]

    def of_block(number: jax.Array) -> jax.Array:  # [batch * kv_heads, blocks] -> like blocks
        number = jnp.repeat(number, batch * heads // number.shape[0], axis=0)
        return jax.vmap(lambda number, block: number[block])(number, jnp.maximum(blocks, 0))

    def of_tile(number: jax.Array) -> jax.Array:  # [batch, tiles] -> [batch * heads, tiles, 1]
        return jnp.repeat(number, heads, axis=0)[..., None]

    first, last = of_block(position.min(-1)), of_block(position.max(-1))
    start, stop = reach[:, :, 0], reach[:, :, 1]  # [batch, tiles, part]
    is_seen = (blocks >= 0) & (first < of_tile(stop.max(-1))) & (of_tile(start.min(-1)) <= last)
    sees_all = (of_tile(start.max(-1)) <= first) & (last < of_tile(stop.min(-1)))
    tile = jnp.where(is_seen, jnp.arange(blocks.shape[1], dtype=jnp.int32)[None, :, None], -1)
    return Pairs(*(array.reshape(batch * heads, -1) for array in (tile, blocks, ~sees_all)))


class Sides(NamedTuple):
    """The arrays of a call as the kernels take them. A row is a head of a batch row; a tile is a part of a query tile.

    Attributes:
      query: `[batch * heads, tiles, part, head_dim]`.
      reach: int32 `[batch, tiles, 2, part]`: first position that a query sees, one past the last.
      key_value: `[batch * kv_heads, blocks, 2, part, head_dim]`, a block's keys and then its values.
      position: int32 `[batch * kv_heads, blocks, 1, part]`.
      pairs: what the lists say.
      query_cut: how queries were cut.
      key_cut: how keys were cut.
    """

    query: jax.Array
    reach: jax.Array
    key_value: jax.Array
    position: jax.Array
    pairs: Pairs
    query_cut: Cut
    key_cut: Cut


def split_sides(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    blocks: jax.Array,
    key_start: jax.Array,
    key_stop: jax.Array,
    key_position: jax.Array,
    query_block_size: int,
    key_block_size: int,
    config: TileConfig,
) -> Sides:
    """Brings the arguments of `attend_tiles_forward` into the kernels' layout."""
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernels take float32 and bfloat16, got query.dtype={query.dtype}")
    query_cut, key_cut = Cut.of(query_block_size, config.largest_tile), Cut.of(key_block_size, config.largest_tile)
    reach = jnp.stack([query_cut.split(array[:, :, None]) for array in (key_start, key_stop)], axis=2)
    position = key_position if key_position.ndim == 3 else key_position[:, :, None]
    position = jnp.broadcast_to(position, (*position.shape[:2], key.shape[2]))  # [batch, keys, kv_heads]
    position = key_cut.split(position, fill=NOWHERE)
    return Sides(
        query=query_cut.split(query),
        reach=reach,
        key_value=jnp.stack([key_cut.split(key), key_cut.split(value)], axis=2),
        position=position[:, :, None],
        pairs=make_pairs(blocks, reach, position, query_cut, key_cut),
        query_cut=query_cut,
        key_cut=key_cut,
    )


def walk(
    span_ref: Any,
    steps_hbm: Any,
    ids_ref: Any,
    ids_semaphore: Any,
    *,
    copies: Callable[[Any, Any, Any], list[Any]],
    mask_copies: Callable[[Any, Any, Any], list[Any]] | None = None,
    entries: int,
    clear: Callable[[Any, Any], None],
    compute: Callable[[Any, bool], None],
) -> None:
    """Runs the steps of this program, each with its partners in one of two buffers.

    Args:
      span_ref: SMEM `[1, 1, 1, 3]`, as `Work.span`.
      steps_hbm: HBM `[rows, steps, 1, 128]`.
      ids_ref: SMEM `[3, 1, 128]`.
      ids_semaphore: DMA `[3]`.
      entries: places for partners in a buffer.
      copies: `copies(buffer, entry, id)`: the copies that bring a partner to its place in a buffer.
      mask_copies: the same for what is needed in a step with a mask alone.
      clear: `clear(buffer, entry)`: fills a place that has no partner with numbers that are harmless.
      compute: `compute(buffer, is_masked)`.
    """
    row = pl.program_id(0)
    first, stop, end = span_ref[0, 0, 0, 0], span_ref[0, 0, 0, 1], span_ref[0, 0, 0, 2]

    def ids_copy(step: Any) -> Any:
        place = lax.rem(step, 3)
        return pltpu.make_async_copy(steps_hbm.at[row, step], ids_ref.at[place], ids_semaphore.at[place])

    def for_entries(begin: Any, end: Any, function: Callable[[Any], None]) -> None:
        def body(entry: Any, carry: None) -> None:
            function(entry)
            return carry

        lax.fori_loop(begin, end, body, None)

    def for_copies(step: Any, act: Callable[[Any], None]) -> None:
        buffer, ids = lax.rem(step, 2), ids_ref.at[lax.rem(step, 3)]

        def act_on(make: Callable[[Any, Any, Any], list[Any]], entry: Any) -> None:
            for copy in make(buffer, entry, ids[0, 2 + entry]):
                act(copy)

        count, is_masked = ids[0, 0], ids[0, 1]
        for_entries(0, count, functools.partial(act_on, copies))
        if mask_copies is not None:
            for_entries(0, count * is_masked, functools.partial(act_on, mask_copies))

    def start(step: Any) -> None:
        for_copies(step, lambda copy: copy.start())
        for_entries(ids_ref[lax.rem(step, 3), 0, 0], entries, lambda entry: clear(lax.rem(step, 2), entry))

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:  # fill the pipeline
        pl.when(end > 0)(ids_copy(0).start)
        pl.when(end > 1)(ids_copy(1).start)

        @pl.when(end > 0)
        def _() -> None:
            ids_copy(0).wait()
            start(0)

    def run(step: Any, carry: None) -> None:
        pl.when(step + 2 < end)(ids_copy(step + 2).start)

        @pl.when(step + 1 < end)
        def _() -> None:
            ids_copy(step + 1).wait()
            start(step + 1)

        for_copies(step, lambda copy: copy.wait())
        buffer, needs_mask = lax.rem(step, 2), ids_ref[lax.rem(step, 3), 0, 1] != 0
        pl.when(needs_mask)(lambda: compute(buffer, True))
        pl.when(jnp.logical_not(needs_mask))(lambda: compute(buffer, False))
        return carry

    lax.fori_loop(first, stop, run, None)


def spread(row: jax.Array, lanes: int) -> jax.Array:
    """A row `[1, n]` turned into a column and repeated along lanes: `[n, lanes]`."""
    column = jnp.broadcast_to(row, (LANES, row.shape[1])).T  # [n, 128]
    return jnp.concatenate([column] * -(-lanes // LANES), axis=1)[:, :lanes]


class KeyBuffers:
    """The two buffers through which the key blocks of a query tile pass.

    Args:
      key_value_hbm: HBM `[kv rows, blocks, 2, block, head_dim]`.
      position_hbm: HBM `[kv rows, blocks, 1, block]`.
      key_value_ref: VMEM `[2, entries, 2, block, head_dim]`.
      position_ref: VMEM `[2, entries, 1, block]`.
      semaphore: DMA `[2]`.
      group: query heads of one key/value head.
    """

    def __init__(
        self,
        key_value_hbm: Any,
        position_hbm: Any,
        key_value_ref: Any,
        position_ref: Any,
        semaphore: Any,
        group: int,
    ):
        self._keys = key_value_hbm, key_value_ref
        self._positions = position_hbm, position_ref
        self._semaphore = semaphore
        self._row = lax.div(pl.program_id(0), group)

    def copies(self, buffer: Any, entry: Any, block: Any) -> list[Any]:
        return [self._copy(*self._keys, buffer, entry, block)]

    def mask_copies(self, buffer: Any, entry: Any, block: Any) -> list[Any]:
        return [self._copy(*self._positions, buffer, entry, block)]

    def _copy(self, hbm: Any, ref: Any, buffer: Any, entry: Any, block: Any) -> Any:
        return pltpu.make_async_copy(hbm.at[self._row, block], ref.at[buffer, entry], self._semaphore.at[buffer])

    def clear(self, buffer: Any, entry: Any) -> None:
        key_value, position = self._keys[1], self._positions[1]
        key_value[buffer, entry] = jnp.zeros(key_value.shape[2:], key_value.dtype)
        position[buffer, entry] = jnp.full(position.shape[2:], NOWHERE, jnp.int32)

    def load(self, buffer: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a step, each `[entries * block, head_dim]`."""
        key_value = self._keys[1]
        key, value = (key_value[buffer, :, side].reshape(-1, key_value.shape[-1]) for side in (0, 1))
        return key, value

    def is_seen(self, buffer: Any, reach: jax.Array) -> jax.Array:
        """Which query sees which key, bool `[entries * block, queries]`; reach `[2, queries]`."""
        position, num_queries = self._positions[1], reach.shape[1]
        columns = [spread(position[buffer, entry], num_queries) for entry in range(position.shape[1])]
        place = jnp.concatenate(columns, axis=0)
        return (reach[0:1] <= place) & (place < reach[1:2])


def key_scratch(entries: int, block: int, head_dim: int, dtype: Any) -> list[Any]:
    """Scratch of a kernel that walks key blocks: ids, their semaphore, the buffers, their semaphore."""
    return [
        *ids_scratch(),
        pltpu.VMEM((2, entries, 2, block, head_dim), dtype),
        pltpu.VMEM((2, entries, 1, block), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def ids_scratch() -> list[Any]:
    """Scratch of `walk`: three steps' ids and their semaphore."""
    return [pltpu.SMEM((3, 1, LANES), jnp.int32), pltpu.SemaphoreType.DMA((3,))]


def product(left: jax.Array, right: jax.Array, dimensions: Any) -> jax.Array:
    """Matrix product in float32; float32 operands at full precision, for the MXU would round them to bfloat16."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _pad(array: jax.Array, axis: int, amount: int, fill: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, amount)
    return jnp.pad(array, widths, constant_values=fill)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
