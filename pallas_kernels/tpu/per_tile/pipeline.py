"""What the per-tile kernels share: work lists, the loop that streams one, and small pieces of kernels.

All three kernels have one shape. A program owns something that stays in VMEM: a query tile (forward, dQ) or a key block
(dK, dV). It streams the list of its partners on the other side, several at a time, and adds up in VMEM. The lists of
all programs of a row of the grid (one head of one batch row) stand one behind the other in HBM, cut into *steps* that
hold up to `entries` partners of one program; a program knows the span of steps that is its own. There is no limit on
the length of a list, no step for an absent partner, and nothing as large as tiles x blocks.

`stream` hides every latency: while a step is computed, the partners of the next one are on their way to the other of
two buffers, and the ids of the one after to SMEM. The pipeline runs on from one program to the next.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import NOWHERE
from pallas_kernels.schedule import make_schedule

LANES = 128

# Rows of the grid are independent; the programs of a row share a pipeline.
COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 << 20)


class Work(NamedTuple):
    """The lists of all programs of each row of the grid, cut into steps.

    Attributes:
      steps: int32 `[rows, lines, 1, 128]`: step after step, several in a line: how many partners the step has, whether
        it needs a mask, the partners' ids.
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
        width = _step_width(entries)
        steps = jnp.pad(steps, ((0, -steps.shape[0] % (LANES // width)), (0, width - steps.shape[1])))
        is_used = jnp.arange(schedule.block.size) < schedule.num_tiles
        owner_of_step = jnp.where(is_used, schedule.block, num_owners)
        bounds = jnp.searchsorted(owner_of_step, jnp.arange(num_owners + 1)).astype(jnp.int32)
        total = jnp.full(num_owners, bounds[-1])
        return Work(steps.reshape(-1, 1, LANES), jnp.stack([bounds[:-1], bounds[1:], total], axis=-1)[:, None])

    return jax.vmap(make_row)(owner, partner, needs_mask)


def _step_width(entries: int) -> int:
    """Numbers that a step takes in a line: a power of two."""
    return 1 << (entries + 1).bit_length()


def stream(
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
      steps_hbm: HBM `[rows, lines, 1, 128]`, as `Work.steps`.
      ids_ref: SMEM `[3, 1, 128]`.
      ids_semaphore: DMA `[3]`.
      entries: places for partners in a buffer.
      copies: `copies(buffer, entry, id)`: the copies that bring a partner to its place in a buffer.
      mask_copies: the same for what is needed in a step with a mask alone.
      clear: `clear(buffer, entry)`: fills a place that has no partner with numbers that are harmless.
      compute: `compute(buffer, is_masked)`.
    """
    row, width = pl.program_id(0), _step_width(entries)
    first, stop, end = span_ref[0, 0, 0, 0], span_ref[0, 0, 0, 1], span_ref[0, 0, 0, 2]

    def ids_copy(step: Any) -> Any:
        place, line = lax.rem(step, 3), lax.div(step, LANES // width)
        return pltpu.make_async_copy(steps_hbm.at[row, line], ids_ref.at[place], ids_semaphore.at[place])

    def read(step: Any, index: Any) -> Any:
        return ids_ref[lax.rem(step, 3), 0, lax.rem(step, LANES // width) * width + index]

    def for_entries(begin: Any, end: Any, function: Callable[[Any], None]) -> None:
        def body(entry: Any, carry: None) -> None:
            function(entry)
            return carry

        lax.fori_loop(begin, end, body, None)

    def for_copies(step: Any, act: Callable[[Any], None]) -> None:
        def act_on(make: Callable[[Any, Any, Any], list[Any]], entry: Any) -> None:
            for copy in make(lax.rem(step, 2), entry, read(step, 2 + entry)):
                act(copy)

        count = read(step, 0)
        for_entries(0, count, functools.partial(act_on, copies))
        if mask_copies is not None:
            for_entries(0, count * read(step, 1), functools.partial(act_on, mask_copies))

    def start(step: Any) -> None:
        for_copies(step, lambda copy: copy.start())
        for_entries(read(step, 0), entries, lambda entry: clear(lax.rem(step, 2), entry))

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
        buffer, needs_mask = lax.rem(step, 2), read(step, 1) != 0
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

    def is_seen(self, buffer: Any, key_range: jax.Array) -> jax.Array:
        """Which query sees which key, bool `[entries * block, queries]`; key_range `[2, queries]`."""
        position, num_queries = self._positions[1], key_range.shape[1]
        columns = [spread(position[buffer, entry], num_queries) for entry in range(position.shape[1])]
        place = jnp.concatenate(columns, axis=0)
        return (key_range[0:1] <= place) & (place < key_range[1:2])


def key_scratch(entries: int, block: int, head_dim: int, dtype: Any) -> list[Any]:
    """Scratch of a kernel that streams key blocks: ids, their semaphore, the buffers, their semaphore."""
    return [
        *ids_scratch(),
        pltpu.VMEM((2, entries, 2, block, head_dim), dtype),
        pltpu.VMEM((2, entries, 1, block), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def ids_scratch() -> list[Any]:
    """Scratch of `stream`: three steps' ids and their semaphore."""
    return [pltpu.SMEM((3, 1, LANES), jnp.int32), pltpu.SemaphoreType.DMA((3,))]
