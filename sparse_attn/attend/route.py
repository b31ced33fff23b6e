"""The router without its table: means of blocks, scores and the best blocks, a step at a time.

The scores of all queries against all blocks grow with the square of the sequence, so a chunk of queries goes through
the blocks a few at a time and keeps its best so far. Only steps that some query of the chunk may see are
visited, which halves the causal work and keeps packed batches cheap, whose tables of blocks are mostly empty.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from sparse_attn.loops import at_most, divisor, heads_per_step, loop_bound, map_heads
from sparse_attn.sharding import vary_alike


def block_means(key: jax.Array, blocks: Blocks) -> jax.Array:
    """Mean key of every block, added up in float32: sum of its keys / their number.

    Args:
      key: `[batch, keys, kv_heads, head_dim]` in block order, padding zero.
      blocks: geometry of the batch.

    Returns:
      float32 (float64 for float64) `[batch, blocks, kv_heads, head_dim]`; zero for a block that does not exist.
    """
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    batch, num_keys, kv_heads, head_dim = key.shape
    if not blocks.is_packed:
        padding = blocks.num_blocks * blocks.block_size - num_keys
        padded = jnp.pad(key, ((0, 0), (0, padding), (0, 0), (0, 0)))
        total = padded.reshape(batch, blocks.num_blocks, blocks.block_size, kv_heads, head_dim).sum(2)
    else:
        add_up = functools.partial(jax.ops.segment_sum, num_segments=blocks.num_blocks, indices_are_sorted=True)
        total = jax.vmap(add_up)(key, blocks.block_of_key())
    return total / jnp.maximum(blocks.block_length, 1)[..., None, None]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What bounds the steps of the router's loops.

    Attributes:
      rows_per_chunk: queries times heads of a group that are in work at a time.
      blocks_per_step: blocks that they are scored against at a time, at least top_k.
      elements_per_step: bounds the heads side by side, see `heads_per_step`.
      step_bytes: if given, takes the place of the bounds above: memory of a step beside inputs and outputs, by
        estimate. Rows without segments are then scored against all blocks in one step.
    """

    rows_per_chunk: int = 2048
    blocks_per_step: int = 128
    elements_per_step: int = 2**20
    step_bytes: int | None = None


def _sized(sizes: Sizes, rows: int, num_heads: int, head_dim: int, blocks: Blocks) -> Sizes:
    """The bounds that follow from `step_bytes`, if that is given and no size is symbolic."""
    if sizes.step_bytes is None or not all(isinstance(size, int) for size in (rows, num_heads, blocks.max_choices)):
        return dataclasses.replace(sizes, step_bytes=None)
    # Rows that hold one segment can have no more blocks than these; others can, but seldom do.
    step_blocks = blocks.max_choices if blocks.is_packed else blocks.num_blocks
    row_bytes = 24 * step_blocks + 8 * head_dim  # scores and ids, sorted and not; the query, as it is and in float32
    chunks = -(-rows * row_bytes // sizes.step_bytes)
    chunk_rows = -(-rows // chunks)
    return Sizes(chunk_rows, step_blocks, sizes.step_bytes * step_blocks // row_bytes, sizes.step_bytes)


def route(query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool, sizes: Sizes) -> jax.Array:
    """Same as `reference.route`."""
    return by_means(query, block_means(key, blocks).swapaxes(1, 2), blocks, top_k, is_causal, sizes)


def by_means(
    query: jax.Array, means: jax.Array, blocks: Blocks, top_k: int, is_causal: bool, sizes: Sizes
) -> jax.Array:
    """The same from the means of the blocks, float32 `[batch, kv_heads, blocks, head_dim]`."""
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads = means.shape[1]
    group = num_heads // kv_heads
    rows = num_queries * group
    sizes = _sized(sizes, rows, batch * kv_heads, head_dim, blocks)
    step_blocks = at_most(max(sizes.blocks_per_step, top_k), blocks.num_blocks)
    whole_steps = (blocks.num_blocks + step_blocks - 1) // step_blocks * step_blocks
    means = jnp.pad(means, ((0, 0), (0, 0), (0, whole_steps - blocks.num_blocks), (0, 0)))
    means = means.reshape(batch * kv_heads, -1, head_dim)

    # Rows are (query, head of the group), query-major, for one key/value head of one batch row.
    chunk_rows = at_most(sizes.rows_per_chunk, rows)
    num_chunks = -(-rows // chunk_rows)
    is_one_step = sizes.step_bytes is not None and whole_steps == step_blocks

    def split(array: jax.Array, fill: int) -> jax.Array:  # [batch, queries, heads, x]
        array = array.reshape(batch, num_queries, kv_heads, group, -1).swapaxes(1, 2)
        array = array.reshape(batch * kv_heads, rows, -1)
        array = jnp.pad(array, ((0, 0), (0, num_chunks * chunk_rows - rows), (0, 0)), constant_values=fill)
        return array.reshape(batch * kv_heads, num_chunks, chunk_rows, -1)

    reach = jnp.stack([blocks.first_block, blocks.last_block], axis=-1)[:, :, None]  # [batch, queries, 1, 2]
    reach = jnp.broadcast_to(reach, (batch, num_queries, num_heads, 2))

    def route_chunk(means: jax.Array, query: jax.Array, reach: jax.Array) -> jax.Array:
        first, last = reach[:, :1], reach[:, 1:]  # [chunk_rows, 1]

        def extend(step: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            mean = jax.lax.dynamic_slice_in_dim(means, step * step_blocks, step_blocks)  # [step_blocks, head_dim]
            block = step * step_blocks + jnp.arange(step_blocks, dtype=jnp.int32)[None, :]
            score = jnp.matmul(query.astype(mean.dtype), mean.T, precision="highest")
            if is_causal:
                score = jnp.where(block == last, jnp.inf, score)
            score = jnp.where(score == 0, 0, score)  # top_k would put 0 above -0
            score = jnp.where((first <= block) & (block <= last), score, -jnp.inf)
            score = jnp.concatenate([best[0], score], axis=1)
            block = jnp.concatenate([best[1], jnp.broadcast_to(block, (chunk_rows, step_blocks))], axis=1)
            score, place = jax.lax.top_k(score, top_k)  # stable, and earlier blocks stand first: S3
            return score, jnp.take_along_axis(block, place, axis=1)

        empty = jnp.full((chunk_rows, top_k), -jnp.inf, means.dtype), jnp.full((chunk_rows, top_k), -1, jnp.int32)
        empty = vary_alike(empty, query)
        if is_one_step:
            score, block = extend(jnp.int32(0), empty)
            return jnp.where(score == -jnp.inf, -1, block)
        has_blocks = first <= last
        begin = jnp.where(has_blocks, first, blocks.num_blocks).min() // step_blocks
        end = jnp.where(has_blocks, last, -1).max() // step_blocks + 1
        score, block = jax.lax.fori_loop(-loop_bound(-begin), loop_bound(end), extend, empty)
        return jnp.where(score == -jnp.inf, -1, block)

    def route_head(means: jax.Array, query: jax.Array, reach: jax.Array) -> jax.Array:
        return jax.lax.map(lambda rows: route_chunk(means, *rows), (query, reach))

    heads = heads_per_step(batch * kv_heads, chunk_rows * step_blocks, sizes.elements_per_step)
    if is_one_step and isinstance(batch, int):
        heads = divisor(batch * kv_heads, heads)
    indices = map_heads(route_head, (means, split(query, 0), split(reach, -1)), heads)
    indices = indices.reshape(batch, kv_heads, -1, top_k)[:, :, :rows]
    indices = indices.reshape(batch, kv_heads, num_queries, group, top_k).swapaxes(2, 3)
    return indices.reshape(batch, num_heads, num_queries, top_k)
