"""The arguments of the per-tile kernels in the layout that the kernels take.

Query tiles and key blocks of any size are brought to *parts* of at most 512 rows, a multiple of 16: a longer tile is
cut into several parts with the same list, a longer block into several ids, and what a part lacks is padding that no
query sees. A part is a whole array of its own behind the leading axes: no copy starts inside a register tile.

The range of positions that a part's queries see, against the positions of a part's keys, tells in advance which pairs
of parts have nothing to do with each other (they are dropped) and which are seen as a whole (they need no mask).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Arrays, Blocks

# Position of a key that is padding: no query sees it.
_MULTIPLE = 16  # rows of a bfloat16 register tile


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of the per-tile kernels.

    Attributes:
      largest_tile: longest query tile or key block that a program owns or loads in one piece; longer ones are cut.
      rows_per_step: keys (forward, dQ) or queries (dK, dV) that a program takes at a time.
    """

    largest_tile: int = 512
    rows_per_step: int = 1024

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < _MULTIPLE or size % _MULTIPLE:
                raise ValueError(f"{name} must be a positive multiple of {_MULTIPLE}, got {name}={size}")


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
        return cls(size, parts, -(-size // (parts * _MULTIPLE)) * _MULTIPLE)

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


def make_pairs(blocks: jax.Array, key_range: jax.Array, position: jax.Array, query_cut: Cut, key_cut: Cut) -> Pairs:
    """Lists the pairs of the selection, cut as the kernels cut them, and finds which need a mask and which are empty.

    Args:
      blocks: int32 `[batch, heads, tiles, list]`, -1 for none, anywhere.
      key_range: int32 `[batch, tiles * query parts, 2, part]`, first position that a query sees and one past the last.
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
    start, stop = key_range[:, :, 0], key_range[:, :, 1]  # [batch, tiles, part]
    is_seen = (blocks >= 0) & (first < of_tile(stop.max(-1))) & (of_tile(start.min(-1)) <= last)
    sees_all = (of_tile(start.max(-1)) <= first) & (last < of_tile(stop.min(-1)))
    tile = jnp.where(is_seen, jnp.arange(blocks.shape[1], dtype=jnp.int32)[None, :, None], -1)
    return Pairs(*(array.reshape(batch * heads, -1) for array in (tile, blocks, ~sees_all)))


class Operands(NamedTuple):
    """The arrays of a call as the kernels take them. A row is a head of a batch row; a tile is a part of a query tile.

    Attributes:
      query: `[batch * heads, tiles, part, head_dim]`.
      key_range: int32 `[batch, tiles, 2, part]`: first position that a query sees, one past the last.
      key_value: `[batch * kv_heads, blocks, 2, part, head_dim]`, a block's keys and then its values.
      position: int32 `[batch * kv_heads, blocks, 1, part]`.
      pairs: what the lists say.
      query_cut: how queries were cut.
      key_cut: how keys were cut.
    """

    query: jax.Array
    key_range: jax.Array
    key_value: jax.Array
    position: jax.Array
    pairs: Pairs
    query_cut: Cut
    key_cut: Cut


def refuses(query: jax.Array, query_block_size: int, block_size: int) -> str | None:
    """Why the kernels for choices made per tile cannot do a call; None if they can."""
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, got query.dtype={query.dtype}"
    for name, size in (("query_block_size", query_block_size), ("key_block_size", block_size)):
        if size < _MULTIPLE:
            return (
                f"the TPU kernels take {name} from {_MULTIPLE} on, for a smaller tile would be mostly padding, got "
                f"{name}={size}"
            )
    return None


def make_operands(
    arrays: Arrays, lists: jax.Array, blocks: Blocks, query_block_size: int, config: TileConfig
) -> Operands:
    """Brings the arguments of `attend_tiles_forward` into the kernels' layout."""
    query, key, value = arrays
    if (reason := refuses(query, query_block_size, blocks.block_size)) is not None:
        raise NotImplementedError(reason)
    query_cut, key_cut = (Cut.of(size, config.largest_tile) for size in (query_block_size, blocks.block_size))
    key_range = jnp.stack([query_cut.split(array[:, :, None]) for array in (blocks.start, blocks.stop)], axis=2)
    position = blocks.key_position()
    position = jnp.broadcast_to(position, (*position.shape[:2], key.shape[2]))  # [batch, keys, kv_heads]
    position = key_cut.split(position, fill=NOWHERE)
    return Operands(
        query=query_cut.split(query),
        key_range=key_range,
        key_value=jnp.stack([key_cut.split(key), key_cut.split(value)], axis=2),
        position=position[:, :, None],
        pairs=make_pairs(lists, key_range, position, query_cut, key_cut),
        query_cut=query_cut,
        key_cut=key_cut,
    )


def _pad(array: jax.Array, axis: int, amount: int, fill: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, amount)
    return jnp.pad(array, widths, constant_values=fill)
