"""Attention of a few new tokens to the chosen blocks of a cache, on a GPU: flash decoding over a list of blocks.

One Triton kernel, and a few lines of XLA that merge its partial results. Compiled and interpreted only: nothing here
has run on a GPU yet.

    union of a key/value head        b1  b3  b6  b7  b9  b12        six blocks, two splits
    program (head, split 0)          b1      b6      b9             output, maximum and sum of these keys
    program (head, split 1)              b3      b7      b12        the same of those
    XLA                              merges the splits of each row by their log-sum-exp

Tiling. Grid (tile of rows, split, key/value head of a batch row). The rows of a key/value head are the new tokens times
the heads of the group; they share the union of their lists (`few_rows.lay_out`), so a block is loaded once for all rows
of a tile. A program keeps its rows [rows, head_dim], their lists [rows, top_k] and the running softmax in registers and
walks the entries split, split + splits, ... of the union, a few keys at a time. It compares a block's id with the
lists: a row attends only the blocks that it chose, up to its own position.

Splits. A single row has no more programs than key/value heads, far fewer than a GPU has multiprocessors. So a union is
dealt out to several programs, round robin: whatever its length, which only the device knows, they have equally much to
do. How many follows from the shapes alone: enough for two programs on each of 132 multiprocessors, at most one for each
entry.

Memory. The cache as it lies, neither copied, padded nor transposed. Partial results: splits float32 copies of the
output, some 0.3 MB at 8 key/value heads, 16 rows, head_dim 128 and 33 splits, which stay in the second cache.

Speed. Bound by memory: (head_dim + value_head_dim) itemsize bytes for each key of the union, against
2 rows (head_dim + value_head_dim) operations on the tensor cores, whose smallest tile has 16 rows. Below some 300 rows
they wait for memory on an H100.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Arrays
from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.few_rows import FewRows, join, lay_out, num_rows
from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.tiles import (
    LARGEST_HEAD_DIM,
    SMALLEST_SIDE,
    ceil_div,
    divide,
    iota,
    load_numbers,
    load_rows,
    loop,
    padded_head_dim,
    plgpu,
    power_of_two,
    store_numbers,
    store_rows,
)
from pallas_kernels.numerics import LOG2_E, NN, NT, OUT_OF_SIGHT, product

_PROGRAMS = 2 * 132  # that fill a GPU
_LARGEST_TOP_K = 64  # of a list in registers


def refuses(arrays: Arrays, top_k: int) -> str | None:
    """Why the kernel cannot do a call with these arrays, those of `attend`; None if it can."""
    query, _, value = arrays
    if top_k > _LARGEST_TOP_K:
        return f"the GPU decode kernel takes top_k up to {_LARGEST_TOP_K}, got {top_k=}"
    if value.shape[4] > LARGEST_HEAD_DIM:
        return f"the GPU kernels take value_head_dim up to {LARGEST_HEAD_DIM}, got value_head_dim={value.shape[4]}"
    return tiles.refuses(query)


def attend(
    arrays: Arrays,
    indices: jax.Array,
    length: jax.Array,
    num_new: jax.Array,
    *,
    scale: float,
    config: TritonConfig = TRITON,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v of each query over the keys of its chosen blocks up to its own position.

    Has not run on a GPU yet. Source: FlashAttention-2 (arXiv 2307.08691), section 3, over a list of blocks.

    Args:
      arrays: query `[batch, queries, heads, head_dim]`, float32, bfloat16 or float16, key `[batch, kv_heads, blocks,
        block_size, head_dim]` and value `[batch, kv_heads, blocks, block_size, value_head_dim]` of its dtype, finite
        numbers.
      indices: int32 `[batch, heads, queries, top_k]`, blocks of keys that the query sees, none twice in a list; -1 for
        none, anywhere.
      length: int32 `[batch]`, tokens of a row, the queries' own included.
      num_new: int32 `[batch]`: query t stands at position length - num_new + t; from num_new on queries are padding.
      scale: factor of the logits.
      config: tile sizes.
      interpret: whether to run on a CPU, interpreted.

    Returns:
      `[batch, queries, heads, value_head_dim]` of query's dtype; zeros for a query with nothing to attend to.

    Raises:
      NotImplementedError: see `refuses`.
    """
    if (reason := refuses(arrays, indices.shape[3])) is not None:
        raise NotImplementedError(reason)
    query, key, value = arrays
    batch, kv_heads, num_blocks, block_size, head_dim = key.shape
    heads, value_head_dim = batch * kv_heads, value.shape[4]
    config = config.for_rows(padded_head_dim(max(head_dim, value_head_dim)), query.dtype.itemsize)
    tile = min(config.tile_size, power_of_two(num_rows(arrays), SMALLEST_SIDE))
    few = lay_out(arrays, indices, length, num_new, row_multiple=tile)
    rows, entries = few.query.shape[2], few.union.shape[2]
    splits = max(1, min(_PROGRAMS // (heads * (rows // tile)), entries))
    partial = heads, splits, rows
    accumulator, largest, total = pl.pallas_call(
        functools.partial(
            _kernel,
            kv_heads=kv_heads,
            num_blocks=num_blocks,
            block_size=block_size,
            rows=rows,
            entries=entries,
            splits=splits,
            top_k=indices.shape[3],
            tile=tile,
            key_size=min(config.key_size, power_of_two(block_size, SMALLEST_SIDE)),
            scale=scale,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads * splits * rows, value_head_dim), jnp.float32),
            *[jax.ShapeDtypeStruct((heads * splits * rows,), jnp.float32)] * 2,
        ],
        grid=(rows // tile, splits, heads),
        compiler_params=plgpu.CompilerParams(num_warps=config.attend_warps, num_stages=config.num_stages),
        name="attend_few",
        interpret=interpret,
    )(*_flat(few), key.reshape(-1, head_dim), value.reshape(-1, value_head_dim))
    output = _merge(accumulator.reshape(*partial, -1), largest.reshape(partial), total.reshape(partial))
    return join(output.reshape(batch, kv_heads, rows, -1).astype(query.dtype), query)


def _flat(few: FewRows) -> tuple[jax.Array, ...]:
    return (
        few.union.reshape(-1),
        few.union_length.reshape(-1),
        (few.indices + 1).reshape(-1, few.indices.shape[3]),
        few.stop.reshape(-1),
        few.query.reshape(-1, few.query.shape[3]),
    )


def _merge(accumulator: jax.Array, largest: jax.Array, total: jax.Array) -> jax.Array:
    """`[heads, rows, value_head_dim]` from the sums of the splits `[heads, splits, rows, value_head_dim]` over 2^x."""
    factor = jnp.exp2(largest - largest.max(1, keepdims=True))
    total = (factor * total).sum(1)[..., None]
    return (factor[..., None] * accumulator).sum(1) / jnp.where(total == 0, 1, total)


def _kernel(
    union_ref: Any,  # [batch * kv_heads * entries]
    count_ref: Any,  # [batch * kv_heads]
    list_ref: Any,  # [batch * kv_heads * rows, top_k], ids shifted by one, for what is not loaded is 0
    stop_ref: Any,  # [batch * rows]
    query_ref: Any,  # [batch * kv_heads * rows, head_dim]
    key_ref: Any,  # [batch * kv_heads * blocks * block_size, head_dim]
    value_ref: Any,  # [batch * kv_heads * blocks * block_size, value_head_dim]
    accumulator_ref: Any,  # [batch * kv_heads * splits * rows, value_head_dim]
    largest_ref: Any,  # [batch * kv_heads * splits * rows]
    total_ref: Any,  # [batch * kv_heads * splits * rows]
    *,
    kv_heads: int,
    num_blocks: int,
    block_size: int,
    rows: int,
    entries: int,
    splits: int,
    top_k: int,
    tile: int,
    key_size: int,
    scale: float,
) -> None:
    row, split, head = pl.program_id(0) * tile + iota(tile), pl.program_id(1), pl.program_id(2)
    columns, value_columns = (padded_head_dim(ref.shape[-1]) for ref in (key_ref, value_ref))
    is_row = row < rows  # all are, but loads take a mask
    stop = load_numbers(stop_ref, divide(head, kv_heads)[0] * rows + row, is_row)  # [tile]
    query = load_rows(query_ref, head * rows + row, is_row, columns)
    lists = load_rows(list_ref, head * rows + row, is_row, power_of_two(top_k, 2))
    parts = ceil_div(block_size, key_size)

    def attend(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        accumulator, largest, total = state
        number, part = divide(step, parts)
        block = union_ref[head * entries + split + number * splits]
        is_chosen = jnp.where(lists == block + 1, 1, 0).max(1) > 0  # [tile]
        rank = part * key_size + iota(key_size)
        is_key = rank < block_size
        key_row = (head * num_blocks + block) * block_size + rank
        key = load_rows(key_ref, key_row, is_key, columns)
        value = load_rows(value_ref, key_row, is_key, value_columns)
        seen = jnp.where(is_chosen, jnp.minimum(stop - block * block_size, block_size), 0)  # keys of the block, [tile]
        is_seen = rank[None, :] < seen[:, None]
        logits = jnp.where(is_seen, product(query, key, NT) * (scale * LOG2_E), OUT_OF_SIGHT)
        new_largest = jnp.maximum(largest, logits.max(1))
        factor = jnp.exp2(largest - new_largest)
        weight = jnp.where(is_seen, jnp.exp2(logits - new_largest[:, None]), 0)
        accumulator = accumulator * factor[:, None] + product(weight.astype(value.dtype), value, NN)
        return accumulator, new_largest, total * factor + weight.sum(1)

    empty = (
        jnp.zeros((tile, value_columns), jnp.float32),
        jnp.full((tile,), OUT_OF_SIGHT, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
    )
    num_entries = ceil_div(jnp.maximum(count_ref[head] - split, 0), splits)
    accumulator, largest, total = loop(0, num_entries * parts, attend, empty)
    place = (head * splits + split) * rows + row
    store_rows(accumulator_ref, place, is_row, accumulator)
    store_numbers(largest_ref, place, is_row, largest)
    store_numbers(total_ref, place, is_row, total)
