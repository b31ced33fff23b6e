"""Pairs to tiles: puts the (query, block) pairs of a selection in the order in which a dense tile can serve them.

Queries that stand next to each other rarely choose the same blocks, so work is ordered by block: all pairs of a block
in one run, cut into tiles of `tile_size` pairs. A tile is then one dense [tile_size, head_dim] x [head_dim, block_size]
product, and the tiles of a block follow one another, so its keys are loaded once and its gradients add up in place.
Plain XLA; every backend shares it.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tiles of pairs, sorted by block. Pair p is the choice number p % top_k of query p // top_k.

    Attributes:
      pair: int32 `[tiles, tile_size]`, the pairs of a tile, num_pairs where the tile is not full.
      block: int32 `[tiles]`, the block that a tile's pairs chose.
      num_tiles: int32 scalar, tiles in use; those behind hold no pair.
    """

    pair: jax.Array
    block: jax.Array
    num_tiles: jax.Array


def make_schedule(indices: jax.Array, *, num_blocks: int, tile_size: int, tiles_per_step: int = 1) -> Schedule:
    """Sorts the pairs of a selection by block and cuts every block's run into tiles.

    Pairs of one block keep their order. The number of tiles in the tables is the worst case,
    floor(pairs / tile_size) + min(num_blocks, pairs), rounded up to a multiple of tiles_per_step.

    Example: indices [[0, -1], [1, 0], [1, 0]] in tiles of 2 pairs give pair [[0, 3], [5, 6], [2, 4], ...] and
    block [0, 0, 1, ...], num_tiles 3 (6 stands for "no pair").

    Args:
      indices: int32 `[queries, top_k]`, ids of the chosen blocks, -1 for none.
      num_blocks: upper bound of the ids (exclusive).
      tile_size: pairs in a tile.
      tiles_per_step: tiles that the caller takes at a time.
    """
    num_pairs = indices.size
    block = jnp.where(indices < 0, num_blocks, indices).reshape(num_pairs)
    sorted_block, sorted_pair = _sort_pairs(block, num_blocks)

    count = jnp.zeros(num_blocks, jnp.int32).at[block].add(1, mode="drop")  # [blocks]
    tiles = -(-count // tile_size)  # [blocks]
    tile_end = jnp.cumsum(tiles)
    first_tile, first_pair = tile_end - tiles, jnp.cumsum(count) - count  # [blocks]

    max_tiles = num_pairs // tile_size + jax.core.min_dim(num_blocks, num_pairs)
    max_tiles = -(-max_tiles // tiles_per_step) * tiles_per_step
    # Slot in the padded order of each pair in the sorted order; pairs without a block fall off the end.
    shift = (first_tile * tile_size - first_pair).at[sorted_block].get(mode="fill", fill_value=max_tiles * tile_size)
    slot = jnp.arange(num_pairs, dtype=jnp.int32) + shift
    pair = jnp.full(max_tiles * tile_size, num_pairs, jnp.int32)
    pair = pair.at[slot].set(sorted_pair, mode="drop", unique_indices=True)
    # How many blocks have ended by each tile; `searchsorted` takes no symbolic sizes.
    tile_block = jnp.cumsum(jnp.zeros(max_tiles, jnp.int32).at[tile_end].add(1, mode="drop"))
    return Schedule(
        pair=pair.reshape(max_tiles, tile_size),
        block=jnp.minimum(tile_block, num_blocks - 1).astype(jnp.int32),
        num_tiles=tile_end[-1],
    )


def _sort_pairs(block: jax.Array, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Stable sort by block: the sorted blocks and the pairs in that order, both int32 `[pairs]`."""
    num_pairs = block.size
    pair = jnp.arange(num_pairs, dtype=jnp.int32)
    most = (num_blocks + 1) * num_pairs
    if not isinstance(most, int) or most > jnp.iinfo(jnp.int32).max:  # not an int: a symbolic size
        sorted_block, sorted_pair = jax.lax.sort((block, pair), num_keys=1, is_stable=True)
    else:  # one array of keys that need no comparator sorts four times as fast on a CPU
        sorted_block, sorted_pair = jnp.divmod(jnp.sort(block * num_pairs + pair, stable=False), num_pairs)
    return sorted_block, sorted_pair
