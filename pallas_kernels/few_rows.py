"""A few queries that attend chosen blocks of a cache, laid out for the decode kernels. Plain XLA on small arrays.

A *row* is one query of one head of a group. The rows of a key/value head share what is fetched: the *union* of their
lists of blocks, each block once; which row attends which block is for the kernel to look up in the row's own list.

    row 0 (head 0)     5 2 0        union     0 2 4 5        count 4
    row 1 (head 1)     5 4 -                  x . x . of row 1's list, and so on: a mask for each block and row
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import Arrays


class FewRows(NamedTuple):
    """The arrays that the kernels take.

    Attributes:
      query: `[batch, kv_heads, rows, head_dim]`.
      indices: int32 `[batch, kv_heads, rows, top_k]`, the blocks of each row, -1 for none.
      stop: int32 `[batch, rows]`, one past the last key that a row sees, 0 for padding.
      union: int32 `[batch, kv_heads, entries]`, the blocks that some row attends, rising; 0 behind the last.
      union_length: int32 `[batch, kv_heads]`, how many they are.
    """

    query: jax.Array
    indices: jax.Array
    stop: jax.Array
    union: jax.Array
    union_length: jax.Array


def num_rows(arrays: Arrays) -> int:
    """Rows of each key/value head: queries times heads of a group."""
    query, key, _ = arrays
    return query.shape[1] * query.shape[2] // key.shape[1]


def num_entries(arrays: Arrays, top_k: int) -> int:
    """The most blocks that the rows of a key/value head can attend together."""
    return min(num_rows(arrays) * top_k, arrays[1].shape[2])


def lay_out(arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, *, row_multiple: int) -> FewRows:
    """Rows of each key/value head, with padding to a multiple, and the union of their blocks.

    Args:
      arrays: query `[batch, queries, heads, head_dim]`, key and value `[batch, kv_heads, blocks, block_size, ...]`.
      indices: int32 `[batch, heads, queries, top_k]`, -1 for none.
      length: int32 `[batch]`, tokens of a row of the batch, the queries' own included.
      num_new: int32 `[batch]`, real queries.
      row_multiple: rows are filled up to a multiple of it, by rows without blocks.
    """
    query, key, _ = arrays
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads, num_blocks, top_k = key.shape[1], key.shape[2], indices.shape[3]
    group, rows = num_heads // kv_heads, num_rows(arrays)
    query = query.reshape(batch, num_queries, kv_heads, group, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, head_dim)
    indices = indices.reshape(batch, kv_heads, rows, top_k)
    token = lax.broadcasted_iota(jnp.int32, (batch, group, num_queries), 2)
    start = (length - num_new)[:, None, None]
    stop = jnp.where(token < num_new[:, None, None], start + token + 1, 0).reshape(batch, rows)

    none = jnp.int32(num_blocks)
    ids = jnp.sort(jnp.where(indices < 0, none, indices).reshape(batch, kv_heads, -1))
    is_repeated = ids == jnp.pad(ids, ((0, 0), (0, 0), (1, 0)), constant_values=-1)[..., :-1]
    union = jnp.sort(jnp.where(is_repeated, none, ids))[..., : min(rows * top_k, num_blocks)]
    is_block = union < none

    padding = -rows % row_multiple
    return FewRows(
        query=jnp.pad(query, ((0, 0), (0, 0), (0, padding), (0, 0))),
        indices=jnp.pad(indices, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=-1),
        stop=jnp.pad(stop, ((0, 0), (0, padding))),
        union=jnp.where(is_block, union, 0),
        union_length=is_block.sum(-1, dtype=jnp.int32),
    )


def join(output: jax.Array, like: jax.Array) -> jax.Array:
    """`[batch, kv_heads, rows, value_head_dim]` to `[batch, queries, heads, value_head_dim]` for a query `like`."""
    batch, num_queries, num_heads, _ = like.shape
    kv_heads, size = output.shape[1], output.shape[3]
    group = num_heads // kv_heads
    output = output[:, :, : group * num_queries].reshape(batch, kv_heads, group, num_queries, size)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, size)
