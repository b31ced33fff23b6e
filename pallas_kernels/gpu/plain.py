"""The two Triton kernels that the Mosaic kernels need as well, in plain JAX, for a JAX without Triton."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.chunks import Chunk, Plan, Rows, find_rows
from pallas_kernels.numerics import LN_2


def merge(
    chunk: Chunk,
    partial_output: jax.Array,
    partial_sum: jax.Array,
    output: jax.Array,
    log_sum_exp: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """As `forward.merge`."""
    is_pair, rows = _pairs(chunk, plan), _rows(chunk, plan)
    log_sum = jnp.where(is_pair, partial_sum.reshape(is_pair.shape), -jnp.inf)  # binary
    largest = log_sum.max(-1, keepdims=True)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weight = jnp.exp2(log_sum - largest)  # [chunk_heads, chunk_rows, top_k]
    total = weight.sum(-1, keepdims=True)
    parts = jnp.where(is_pair[..., None], partial_output.reshape(*is_pair.shape, -1), 0).astype(jnp.float32)
    merged = (weight[..., None] * parts).sum(2) / jnp.where(total == 0, 1, total)
    merged_sum = ((largest + jnp.log2(total)) * LN_2)[..., 0]
    return _write(output, rows, merged), _write(log_sum_exp, rows, merged_sum)


def add_up(chunk: Chunk, partial: jax.Array, d_query: jax.Array, plan: Plan) -> jax.Array:
    """As `backward.add_up`."""
    is_pair = _pairs(chunk, plan)
    parts = jnp.where(is_pair[..., None], partial.reshape(*is_pair.shape, -1), 0)
    return _write(d_query, _rows(chunk, plan), parts.astype(jnp.float32).sum(2))


def _pairs(chunk: Chunk, plan: Plan) -> jax.Array:
    """Which choices are pairs, bool `[chunk_heads, chunk_rows, top_k]`."""
    return chunk.indices.reshape(plan.chunk_heads, plan.chunk_rows, plan.top_k) >= 0


def _rows(chunk: Chunk, plan: Plan) -> Rows:
    """The rows of the chunk, `[chunk_heads, chunk_rows]`."""
    shape = plan.chunk_heads, plan.chunk_rows
    head, row = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return find_rows(chunk.origin, head, row, jnp.ones(shape, bool), plan)


def _write(array: jax.Array, rows: Rows, new: jax.Array) -> jax.Array:
    """`[batch * queries * heads, ...]` with the rows of the chunk anew."""
    place = jnp.where(rows.is_real, rows.place, array.shape[0])
    return array.at[place].set(new.astype(array.dtype), mode="drop", unique_indices=True)
