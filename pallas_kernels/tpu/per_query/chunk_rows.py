"""A chunk's queries and outputs on their way between HBM and the chip, in the forward kernels.

Queries become rows of words with their key_stop behind (`tiles`); what has been added up for them becomes outputs
and log-sum-exps. Both happen on chip: XLA would write rows, and read sums, in several passes over HBM. Arrays lie there
in pieces, which are copied while others are worked on. Numbers of which a query has one lie along lanes in HBM, and are
turned by a transpose. Speed: copies and the vector unit alike, some 0.6 cycles a row each way.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import LOG2_E
from pallas_kernels.tpu.per_query import memory
from pallas_kernels.tpu.per_query.memory import LANES, SPARE_ROWS

GROUP = 128  # rows that are worked on at a time; chunks are multiples of it
_PIECE_BYTES = 1 << 19  # of a longer chunk; the latency of a shorter copy is not hidden


def choose_piece_rows(num_rows: int, head_dim: int, dtype: Any, piece_rows: int | None) -> int:
    """Rows of a piece of a chunk of num_rows; piece_rows as in `PerQueryConfig`."""
    if piece_rows is not None:
        return math.gcd(num_rows, piece_rows)
    if num_rows <= 1024:
        return num_rows
    return math.gcd(num_rows, _PIECE_BYTES // (memory.round_up(head_dim, LANES) * jnp.dtype(dtype).itemsize))


class Buffers(NamedTuple):
    """Two pieces of each array on chip, `[2, ...]`. Outputs take the place of queries."""

    query: Any
    key_stop: Any
    log_sum_exp: Any
    semaphore: Any  # DMA [2]

    @classmethod
    def allocate(cls, query: jax.Array, key_stop: jax.Array) -> "Buffers":
        """Scratch shapes for `[pieces, piece_rows, head_dim]` and `[pieces, piece_rows / 128, 128]`."""
        number_shape = 2, *key_stop.shape[1:]
        return cls(
            pltpu.VMEM((2, *query.shape[1:]), query.dtype),
            pltpu.VMEM(number_shape, jnp.int32),
            pltpu.VMEM(number_shape, jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        )


def load(query_hbm: Any, key_stop_hbm: Any, rows_ref: Any, buffers: Buffers) -> None:
    """In a kernel: makes the rows of a chunk, and the spare ones behind.

    Args:
      query_hbm: HBM `[pieces, piece_rows, head_dim]`.
      key_stop_hbm: HBM int32 `[pieces, piece_rows / 128, 128]`.
      rows_ref: uint32 `[(chunk_rows + 8) * parts, 128]`: query, key_stop, zeros.
      buffers: for copies.
    """
    num_pieces, num_rows, _ = query_hbm.shape
    parts = rows_ref.shape[0] // (num_pieces * num_rows + SPARE_ROWS)
    spare = rows_ref.shape[0] - SPARE_ROWS * parts
    rows_ref[spare:, :] = jnp.zeros((SPARE_ROWS * parts, LANES), jnp.uint32)

    def load_piece(piece: Any, query_ref: Any, key_stop_ref: Any) -> None:
        def load_group(group: Any, carry: None) -> None:
            place = pl.multiple_of(group * GROUP, GROUP)
            words = memory.to_words(query_ref[pl.ds(place, GROUP), :])
            rows = jnp.concatenate([words, jnp.zeros((GROUP, parts * LANES - words.shape[1]), jnp.uint32)], axis=1)
            key_stop = jnp.broadcast_to(key_stop_ref[pl.ds(group, 1), :], (LANES, GROUP)).T  # in all lanes of its row
            key_stop = jnp.concatenate([lax.bitcast_convert_type(key_stop, jnp.uint32)] * parts, axis=1)
            lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
            rows = jnp.where(lane == words.shape[1], key_stop, rows)
            memory.write_rows(rows_ref, piece * num_rows + place, rows, parts)
            return carry

        lax.fori_loop(0, num_rows // GROUP, load_group, None, unroll=True)

    refs = buffers.query, buffers.key_stop
    _for_pieces(load_piece, (query_hbm, key_stop_hbm), refs, buffers.semaphore, is_output=False)


def finish(state_ref: Any, output_hbm: Any, log_sum_exp_hbm: Any, buffers: Buffers) -> None:
    """In a kernel: divides what a chunk's rows have added up, and takes the logarithms. Zero and -inf if nothing.

    Args:
      state_ref: `[(chunk_rows + 8) * state_parts, 128]`: output (not divided), sum of weights, and in the last lane
        maximum * log2(e).
      output_hbm: HBM `[pieces, piece_rows, head_dim]`.
      log_sum_exp_hbm: HBM float32 `[pieces, piece_rows / 128, 128]`.
      buffers: for copies.
    """
    num_pieces, num_rows, head_dim = output_hbm.shape
    parts = state_ref.shape[0] // (num_pieces * num_rows + SPARE_ROWS)

    def finish_piece(piece: Any, output_ref: Any, log_sum_exp_ref: Any) -> None:
        def finish_group(group: Any, carry: None) -> None:
            place = pl.multiple_of(group * GROUP, GROUP)
            state = memory.read_rows(state_ref, piece * num_rows + place, GROUP, parts)  # [GROUP, parts * 128]
            number = state[:, -LANES:].T  # [128, GROUP]
            total, largest = number[head_dim % LANES : head_dim % LANES + 1], number[LANES - 1 :]
            log_sum_exp_ref[pl.ds(group, 1), :] = jnp.where(total == 0, -jnp.inf, largest / LOG2_E + jnp.log(total))
            total = state[:, head_dim : head_dim + 1]  # [GROUP, 1]
            output = state[:, :head_dim] / jnp.where(total == 0, 1.0, total)
            output_ref[pl.ds(place, GROUP), :] = output.astype(output_ref.dtype)
            return carry

        lax.fori_loop(0, num_rows // GROUP, finish_group, None, unroll=True)

    refs = buffers.query, buffers.log_sum_exp
    _for_pieces(finish_piece, (output_hbm, log_sum_exp_hbm), refs, buffers.semaphore, is_output=True)


def _for_pieces(
    body: Callable[..., None], arrays: tuple[Any, ...], refs: tuple[Any, ...], semaphore: Any, *, is_output: bool
) -> None:
    """Calls body(piece, *pieces on chip) for each piece of arrays in HBM, while the next or last is copied.

    By hand: Pallas's own pipeline asks which device there is, and so cannot be compiled for another.
    """
    num_pieces = arrays[0].shape[0]

    def copies(piece: Any, place: int) -> list[Any]:
        pairs = [(array.at[piece], ref.at[place]) for array, ref in zip(arrays, refs, strict=True)]
        return [pltpu.make_async_copy(*(pair[::-1] if is_output else pair), semaphore.at[place]) for pair in pairs]

    def start(piece: Any, place: int) -> None:
        for copy in copies(piece, place):
            copy.start()

    def wait(piece: Any, place: int) -> None:
        for copy in copies(piece, place):
            copy.wait()

    def load_piece(piece: Any, place: int) -> None:
        pl.when(piece + 1 < num_pieces)(lambda: start(piece + 1, 1 - place))
        wait(piece, place)
        body(piece, *(ref.at[place] for ref in refs))

    def store_piece(piece: Any, place: int) -> None:
        pl.when(piece >= 2)(lambda: wait(piece - 2, place))
        body(piece, *(ref.at[place] for ref in refs))
        start(piece, place)

    def two_pieces(number: Any, carry: None) -> None:
        for place in range(2):
            piece = number * 2 + place
            pl.when(piece < num_pieces)(functools.partial(move_piece, piece, place))
        return carry

    move_piece = store_piece if is_output else load_piece
    if not is_output:
        start(0, 0)
    lax.fori_loop(0, -(-num_pieces // 2), two_pieces, None)
    if is_output:
        for piece in range(max(num_pieces - 2, 0), num_pieces):
            wait(piece, piece % 2)
