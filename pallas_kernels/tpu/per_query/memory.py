"""What the per-query kernels share: rows of queries as they lie on chip, pieces of key blocks, chunks and their tiles.

Rows. A chunk's queries are rows that the kernels fetch by number, one at a time, and a row on chip is a whole number of
*parts*, 128 words of 32 bits: only such rows can be addressed singly. float32 takes a word an element; two bfloat16
share a word, elements e and e + head_dim / 2. What else a kernel needs to know about a query (how far it sees,
statistics of its softmax) follows in the words behind, so that one fetch brings all. The rows of an array lie part
under part, `[rows * parts, 128]`, and kernels are told the first part of a row instead of its number: the scalar unit,
which bounds them, then has nothing to multiply.

Pieces. Keys lie in HBM in pages: block_size keys, rounded up to 16. Where blocks are as long as pages and start where
they do, block and page are one. Packed sequences start blocks anywhere; such a block is cut where a page ends, into two
pieces at most. A tile then is a run of pairs that share one piece: it loads the piece's page and sees the keys from
`start` to `stop` of it. Everything behind this file knows pieces only.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks

LANES = 128
SPARE_ROWS = 8  # behind a chunk's rows; the slots of a tile that hold no pair point to the first
ROWS_AT_ONCE = 8  # rows of an accumulator loaded before any is stored


class Pieces(NamedTuple):
    """Where pieces lie. int32 `[pieces]` each: the page, the place of the first key and one past the last."""

    page: jax.Array
    start: jax.Array
    stop: jax.Array


class Tiles(NamedTuple):
    """Tiles of one chunk.

    Attributes:
      row: int32 `[steps, tiles_per_step, tile_size]`, the row of each slot, chunk_rows where there is no pair. One step
        more than is used, without pairs.
      page: int32 `[tiles]`.
      start: int32 `[tiles]`.
      stop: int32 `[tiles]`.
      num_steps: int32 scalar, steps in use, at least 1.
    """

    row: jax.Array
    page: jax.Array
    start: jax.Array
    stop: jax.Array
    num_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Cut:
    """How keys are cut into pages, and whether blocks keep to them."""

    page_size: int
    is_aligned: bool

    @classmethod
    def of(cls, blocks: Blocks) -> "Cut":
        return cls(round_up(blocks.block_size, 16), not blocks.is_packed and blocks.block_size % 16 == 0)

    @property
    def pieces_per_block(self) -> int:
        return 1 if self.is_aligned else 2


def refuses(query: jax.Array, blocks: Blocks) -> str | None:
    """What the kernels for choices made by every query cannot do, in words; None if they can."""
    head_dim, block_size = query.shape[-1], blocks.block_size
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, got query.dtype={query.dtype}"
    if head_dim % 32 or head_dim > 256:
        return (
            f"the TPU kernels take a head_dim that is a multiple of 32 up to 256, got head_dim={head_dim}: rows are "
            "fetched as whole words of 32 bits and a chunk of longer ones does not fit on chip"
        )
    if not 16 <= block_size <= 1024:
        return (
            f"the TPU kernels take a block_size from 16 to 1024, got block_size={block_size}: a smaller block "
            "leaves the matrix unit empty, a larger one does not fit on chip"
        )
    return None


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def words_of(head_dim: int, dtype: Any) -> int:
    """Words of 32 bits that one query takes."""
    return head_dim if dtype == jnp.float32 else head_dim // 2


def parts_of(num_words: int) -> int:
    """Parts of a row of so many words."""
    return -(-num_words // LANES)


def to_words(array: jax.Array) -> jax.Array:
    """`[..., head_dim]` float32 or bfloat16 to uint32 `[..., words]`; two bfloat16 a word, the lower half first."""
    bits = lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    if array.dtype == jnp.float32:
        return bits
    half = array.shape[-1] // 2
    return (bits[..., :half] >> 16) | bits[..., half:]


def pack_rows(*parts: jax.Array) -> jax.Array:
    """Puts the words of each row side by side, and the spare rows behind.

    Args:
      parts: `[chunk_rows, x]` each, float32, bfloat16 or int32.

    Returns:
      uint32 `[(chunk_rows + 8) * parts, 128]`, zero where there is nothing.
    """
    words = [
        lax.bitcast_convert_type(part, jnp.uint32) if part.dtype == jnp.int32 else to_words(part) for part in parts
    ]
    row = jnp.concatenate(words, axis=-1)
    row = jnp.pad(row, ((0, SPARE_ROWS), (0, -row.shape[-1] % LANES)))
    return row.reshape(-1, LANES)


def read_rows(ref: Any, first: int, num_rows: int, parts: int) -> jax.Array:
    """Rows of `[rows * parts, 128]`, where a row's parts lie under each other, side by side: `[rows, parts * 128]`."""
    if parts == 1:
        return ref[pl.ds(first, num_rows), :]
    pieces = [ref[pl.ds(first * parts + part, num_rows, stride=parts), :] for part in range(parts)]
    return jnp.concatenate(pieces, axis=1)


def write_rows(ref: Any, first: int, rows: jax.Array, parts: int) -> None:
    """Undoes `read_rows`."""
    num_rows = rows.shape[0]
    if parts == 1:
        ref[pl.ds(first, num_rows), :] = rows
        return
    for part in range(parts):
        ref[pl.ds(first * parts + part, num_rows, stride=parts), :] = rows[:, part * LANES : (part + 1) * LANES]


def from_words(rows: jax.Array, first: int, head_dim: int, dtype: Any) -> jax.Array:
    """In a kernel: the `head_dim` numbers whose words begin at `first` of uint32 `[rows, lanes]`."""
    words = rows[:, first : first + words_of(head_dim, dtype)]
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(words, jnp.float32)
    low = lax.bitcast_convert_type(words << 16, jnp.float32)
    high = lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.concatenate([low, high], axis=1).astype(dtype)


def is_seen(start: Any, stop: Any, key_stop: jax.Array, page: Any, page_size: int) -> jax.Array:
    """In a kernel: which query of a tile sees which key of its page, bool `[pairs, page_size]`.

    Args:
      start: scalar, place of the first key of the piece.
      stop: scalar, one past its last.
      key_stop: int32 `[pairs, 1]`.
      page: scalar, number of the page.
      page_size: keys of a page.
    """
    place = lax.broadcasted_iota(jnp.int32, (key_stop.shape[0], page_size), 1) + page * page_size
    return (place >= start) & (place < jnp.minimum(key_stop, stop))


def clear_outside(array: jax.Array, start: Any, stop: Any, page: Any) -> jax.Array:
    """In a kernel: zeros in place of the keys of a page `[page_size, x]` that are not of the piece."""
    place = lax.broadcasted_iota(jnp.int32, array.shape, 0) + page * array.shape[0]
    return jnp.where((place >= start) & (place < stop), array, 0)


def fill_rows(ref: Any, value: jax.Array) -> None:
    """In a kernel: sets all rows of `[rows * parts, 128]`, a multiple of 8 of them, to `[parts, 128]`."""
    size = ROWS_AT_ONCE * value.shape[0]
    rows = jnp.concatenate([value] * ROWS_AT_ONCE, axis=0)

    def fill(batch: Any, carry: None) -> None:
        ref[pl.ds(pl.multiple_of(batch * size, size), size), :] = rows
        return carry

    lax.fori_loop(0, ref.shape[0] // size, fill, None)


def fetch_rows(part_ref: Any, rows_ref: Any, fetched_ref: Any) -> None:
    """In a kernel: copies rows.

    The slots of a tile stand in a straight line of code: a number at a fixed place needs no address to be computed.

    Args:
      part_ref: SMEM `[1, tiles, tile_size]`, first parts of rows.
      rows_ref: `[rows * parts, 128]`, from which to copy.
      fetched_ref: `[tiles * tile_size * parts, 128]`, the copies.
    """
    _, num_tiles, tile_size = part_ref.shape

    def fetch(tile: Any, carry: None) -> None:
        for slot in range(tile_size):
            _fetch_row(part_ref, rows_ref, fetched_ref, tile, slot)
        return carry

    lax.fori_loop(0, num_tiles, fetch, None)


def _fetch_row(part_ref: Any, rows_ref: Any, fetched_ref: Any, tile: Any, slot: int) -> None:
    place = _place(part_ref, fetched_ref, tile, slot)
    fetched_ref[place, :] = rows_ref[pl.ds(part_ref[0, tile, slot], place.size), :]


def _place(part_ref: Any, ref: Any, tile: Any, slot: int) -> Any:
    """The parts of a slot in `[tiles * tile_size * parts, 128]`."""
    _, num_tiles, tile_size = part_ref.shape
    parts = ref.shape[0] // (num_tiles * tile_size)
    return pl.ds(pl.multiple_of(tile * tile_size * parts, tile_size * parts) + slot * parts, parts)


def add_rows(part_ref: Any, result_ref: Any, rows_ref: Any, fetch: tuple[Any, Any, Any] | None = None) -> None:
    """In a kernel: adds to rows, the other way of `fetch_rows`.

    The rows of a tile must differ: a batch of them is loaded before any is stored. Two slots may both point to the row
    of padding, where sums get lost and may be.

    Args:
      part_ref: SMEM `[1, tiles, tile_size]`, first parts of rows.
      result_ref: `[tiles * tile_size * parts, 128]`, what to add.
      rows_ref: `[rows * parts, 128]`, to which.
      fetch: arguments of `fetch_rows`, for as many rows, to be done on the way: while an addition waits for its loads,
        there is room for the loads and stores of a copy.
    """
    _, num_tiles, tile_size = part_ref.shape

    def add(tile: Any, carry: None) -> None:
        for batch in range(0, tile_size, ROWS_AT_ONCE):
            slots = range(batch, batch + ROWS_AT_ONCE)
            places = [_place(part_ref, result_ref, tile, slot) for slot in slots]
            rows = [pl.ds(part_ref[0, tile, slot], place.size) for slot, place in zip(slots, places, strict=True)]
            results = [result_ref[place, :] for place in places]
            sums = [rows_ref[row, :] + result for row, result in zip(rows, results, strict=True)]
            for slot, row, new in zip(slots, rows, sums, strict=True):
                rows_ref[row, :] = new
                if fetch is not None:
                    _fetch_row(*fetch, tile, slot)
        return carry

    lax.fori_loop(0, num_tiles, add, None)


def split_heads(array: jax.Array, kv_heads: int, num_chunks: int, chunk_rows: int) -> jax.Array:
    """`[batch, queries, heads, x]` to `[batch * kv_heads, chunks, chunk_rows, x]`, zeros behind the last query."""
    batch, num_queries, _, size = array.shape
    array = array.reshape(batch, num_queries, kv_heads, -1, size).swapaxes(1, 2)
    array = array.reshape(batch * kv_heads, -1, size)
    array = jnp.pad(array, ((0, 0), (0, num_chunks * chunk_rows - array.shape[1]), (0, 0)))
    return array.reshape(batch * kv_heads, num_chunks, chunk_rows, size)


def split_indices(indices: jax.Array, kv_heads: int, num_chunks: int, chunk_rows: int) -> jax.Array:
    """`[batch, heads, queries, top_k]` to `[batch * kv_heads, chunks, top_k, chunk_rows]`, -1 behind the last query.

    Rows lie along lanes, as the router writes them; few numbers a row would fill few lanes.
    """
    indices = split_heads(indices.swapaxes(1, 2) + 1, kv_heads, num_chunks, chunk_rows) - 1
    return indices.swapaxes(2, 3)


def join_heads(array: jax.Array, batch: int, num_queries: int, num_heads: int) -> jax.Array:
    """Undoes `split_heads`."""
    num_rows, size = array.shape[0], array.shape[-1]
    kv_heads = num_rows // batch
    array = array.reshape(batch, kv_heads, -1, size)[:, :, : num_queries * (num_heads // kv_heads)]
    array = array.reshape(batch, kv_heads, num_queries, -1, size)
    return array.swapaxes(1, 2).reshape(batch, num_queries, num_heads, size)


def split_keys(array: jax.Array, page_size: int) -> jax.Array:
    """`[batch, keys, kv_heads, x]` to `[batch * kv_heads, pages, page_size, x]`, zeros behind the last key."""
    batch, num_keys, kv_heads, size = array.shape
    array = jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, -num_keys % page_size), (0, 0)))
    return array.reshape(batch * kv_heads, -1, page_size, size)


def join_keys(array: jax.Array, batch: int, num_keys: int) -> jax.Array:
    """Undoes `split_keys`."""
    num_rows, num_pages, page_size, size = array.shape
    array = array.reshape(batch, num_rows // batch, num_pages * page_size, size)
    return array[:, :, :num_keys].swapaxes(1, 2)


def make_pieces(
    indices: jax.Array, block_start: jax.Array, block_length: jax.Array, cut: Cut
) -> tuple[jax.Array, Pieces]:
    """Cuts chosen blocks into pieces, for one batch row.

    Args:
      indices: int32 `[top_k, rows]`, the blocks of each row, -1 for none.
      block_start: int32 `[blocks]`, place of a block's first key.
      block_length: int32 `[blocks]`, keys in the block.
      cut: of the keys.

    Returns:
      Ids of pieces in the order of their places, int32 `[top_k or twice as many, rows]`, and the pieces.
    """
    block_stop = block_start + block_length
    if cut.is_aligned:
        page = jnp.arange(block_start.size, dtype=jnp.int32)
        return indices, Pieces(page, block_start, block_stop)
    page = block_start // cut.page_size
    middle = jnp.minimum((page + 1) * cut.page_size, block_stop)
    pairs = (page, page + 1), (block_start, middle), (middle, block_stop)
    pieces = Pieces(*(jnp.stack(pair, axis=1).reshape(-1) for pair in pairs))
    is_cut = (middle < block_stop).at[indices].get(mode="fill", fill_value=False)  # [top_k, rows]
    first = jnp.where(indices < 0, -1, 2 * indices)
    second = jnp.where((indices < 0) | ~is_cut, -1, 2 * indices + 1)
    return jnp.concatenate([first, second], axis=0), pieces
