"""MoBA's router on a GPU: means of key blocks, and every query's exact best blocks, without a table of all scores.

Two Triton kernels. Neither writes anything that grows with queries x blocks. Compiled and interpreted only: nothing
here has run on a GPU yet.

Means. Grid (group of blocks, kv head of a batch row). A program adds up the keys of a few blocks, a few keys of each at
a time: a tile [blocks, keys, head_dim], summed over the keys. Blocks may start anywhere and have any length, packed
sequences included. Each key is read once: bound by memory.

Scores and choice. Grid (tile of queries, query head of a batch row). A program keeps its queries [queries, head_dim] in
registers and walks the panels of blocks that one of them may choose. It computes the scores [queries, blocks] of a
panel and merges them into each query's list of the best so far, `top_k` scores and ids in no order, also in
registers, by repeated extraction: take each query's best remaining block of the panel, put it in the place of the
worst of its list if it is better, strike it out, and stop when no query's next best beats the worst of its list.
Order gives the tie rule: panels rise, extraction takes the lowest id among equals, only a strictly better block
enters, and the highest id among equals leaves. At the end the list is written in falling order, one column at a time.

Precision. Scores are float32 products, computed by the tensor cores all the same: a float32 number is split into three
bfloat16 numbers that add up to it exactly, a float16 one into two, and each part of a query meets each part of a mean.
That is three passes for bfloat16 queries, nine for float32.

Speed. At 64K tokens, block_size 128, head_dim 128, 32 heads: the scores of the visible blocks are 0.14 TFLOP, three
times that in the three passes, 0.4 ms on an H200 at its peak. An extraction reads every score of a panel once, about
eight operations each; a panel takes top_k of them at first, later ones fewer: by an estimate 0.4 ms. Bound by
arithmetic, of both kinds alike, and the only stage that grows with the square of the sequence. Compiled for sm_90 it
spills no registers: rows of more than 128 columns are split into parts, and multiplied, 128 columns at a time. That
takes nothing away from the tiles, and adds neither bytes nor operations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks
from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.gpu import tiles
from pallas_kernels.gpu.tiles import (
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
from pallas_kernels.numerics import NT, product

# Id of an empty place in a list, before its number is added: above every block.
_NO_BLOCK = 1 << 30
_LARGEST_TOP_K = 64  # of a list in registers
_PIECE = 128  # columns that are split at a time: for 256 at once the registers do not suffice


def refuses(query: jax.Array, top_k: int) -> str | None:
    """Why the router cannot do a call; None if it can."""
    if top_k > _LARGEST_TOP_K:
        return f"the GPU router takes top_k up to {_LARGEST_TOP_K}, got {top_k=}"
    return tiles.refuses(query)


def route(
    query: jax.Array,
    key: jax.Array,
    blocks: Blocks,
    *,
    top_k: int,
    is_causal: bool,
    config: TritonConfig = TRITON,
    interpret: bool = False,
) -> jax.Array:
    """The blocks that each query chooses: the `top_k` largest scores, score = query . mean(keys of the block).

    Means, products and sums are float32. Ties go to the lower block index, and 0 equals -0. Causal: the own block,
    which is `blocks.last_block`, is always chosen and comes first. Sources: MoBA (arXiv 2502.13189), section 2. Has not
    run on a GPU yet.

    Args:
      query: float32, bfloat16 or float16 `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` of query's dtype, in block order, padding zero; heads is a multiple of
        kv_heads.
      blocks: the geometry of the call.
      top_k: blocks that a query may choose, at most the number of blocks.
      is_causal: whether the own block is forced.
      config: tile sizes.
      interpret: whether to run on a CPU, interpreted.

    Returns:
      int32 `[batch, heads, queries, top_k]`: the own block first (causal), then by falling score; -1 for none.

    Raises:
      NotImplementedError: a dtype, head_dim or top_k that the kernel cannot do.
    """
    if (reason := refuses(query, top_k)) is not None:
        raise NotImplementedError(reason)
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads, num_blocks = key.shape[2], blocks.num_blocks
    means = block_means(key, blocks, config=config, interpret=interpret)
    parts = ceil_div(jnp.finfo(query.dtype).nmant + 1, 8)  # bfloat16 numbers that hold a number of the queries
    tile = min(config.route_queries, power_of_two(num_queries, SMALLEST_SIDE))
    indices = pl.pallas_call(
        functools.partial(
            _route_kernel,
            num_queries=num_queries,
            num_heads=num_heads,
            group=num_heads // kv_heads,
            num_blocks=num_blocks,
            parts=parts,
            tile=tile,
            panel=min(config.route_blocks, power_of_two(num_blocks, SMALLEST_SIDE)),
            top_k=top_k,
            is_causal=is_causal,
        ),
        out_shape=jax.ShapeDtypeStruct((batch * num_heads * num_queries * top_k,), jnp.int32),
        grid=(ceil_div(num_queries, tile), batch * num_heads),
        compiler_params=plgpu.CompilerParams(num_warps=config.route_warps, num_stages=config.num_stages),
        name="moba_route",
        interpret=interpret,
    )(
        query.reshape(-1, head_dim),
        means.reshape(-1, head_dim),
        blocks.first_block.reshape(-1),
        blocks.last_block.reshape(-1),
    )
    return indices.reshape(batch, num_heads, num_queries, top_k)


def _split_exactly(numbers: jax.Array, parts: int) -> list[jax.Array]:
    """bfloat16 arrays that add up to a float32 one, the largest first: 8 bits of the mantissa each, of 24."""
    split = []
    for _ in range(parts):
        bits = lax.bitcast_convert_type(numbers, jnp.int32) & jnp.int32(-1 << 16)
        part = lax.bitcast_convert_type(bits, jnp.float32)  # a pair of casts could be optimised out
        split.append(part.astype(jnp.bfloat16))
        numbers = numbers - part
    return split


def _route_kernel(
    query_ref: Any,  # [batch * queries * heads, head_dim]
    mean_ref: Any,  # [batch * kv_heads * blocks, head_dim]
    first_ref: Any,  # [batch * queries]
    last_ref: Any,  # [batch * queries]
    indices_ref: Any,  # [batch * heads * queries * top_k]
    *,
    num_queries: int,
    num_heads: int,
    group: int,
    num_blocks: int,
    parts: int,
    tile: int,
    panel: int,
    top_k: int,
    is_causal: bool,
) -> None:
    row = pl.program_id(1)
    batch_row, head = divide(row, num_heads)
    first_mean = divide(row, group)[0] * num_blocks  # heads of a group follow one another
    columns = padded_head_dim(query_ref.shape[-1])

    place = pl.program_id(0) * tile + iota(tile)
    is_query = place < num_queries
    token = batch_row * num_queries + place
    pieces = [(min(columns, _PIECE), begin) for begin in range(0, columns, _PIECE)]
    query = [load_rows(query_ref, token * num_heads + head, is_query, *piece) for piece in pieces]
    query_parts = [_split_exactly(piece.astype(jnp.float32), parts) for piece in query]
    first = load_numbers(first_ref, token, is_query)  # [queries]
    last = load_numbers(last_ref, token, is_query, other=-1)
    has_blocks = first <= last
    begin, _ = divide(jnp.where(has_blocks, first, num_blocks).min(), panel)
    end = ceil_div(jnp.where(has_blocks, last, -1).max() + 1, panel)

    places = power_of_two(top_k, 2)
    slot = lax.broadcasted_iota(jnp.int32, (tile, places), 1)
    column = lax.broadcasted_iota(jnp.int32, (tile, panel), 1)

    def scores_of(step: jax.Array) -> jax.Array:  # [queries, panel]
        block = step * panel + iota(panel)
        score = jnp.zeros((tile, panel), jnp.float32)
        pairs = [(i, j) for i in range(parts) for j in range(3)]
        for piece, query_piece in zip(pieces, query_parts, strict=True):
            mean_piece = _split_exactly(load_rows(mean_ref, first_mean + block, block < num_blocks, *piece), 3)
            for i, j in sorted(pairs, key=sum, reverse=True):  # the smallest products first
                score += product(query_piece[i], mean_piece[j], NT)
        if is_causal:
            score = jnp.where(block[None, :] == last[:, None], jnp.inf, score)
        is_visible = (first[:, None] <= block[None, :]) & (block[None, :] <= last[:, None])
        return jnp.where(is_visible, score, -jnp.inf)

    def is_better(score: jax.Array, best_score: jax.Array) -> jax.Array:
        """Whether some query has a block in the panel that beats the worst of its list."""
        return jnp.where(score.max(1) > best_score.min(1), 1, 0).max() > 0

    def merge(step: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score = scores_of(step)

        def extract(state: tuple) -> tuple:
            _, score, best_score, best_block = state
            top, worst = score.max(1), best_score.min(1)
            top_place = jnp.where(score == top[:, None], column, panel).min(1)
            is_worst = best_score == worst[:, None]
            leaving = jnp.where(is_worst, best_block, -1).max(1)
            is_hit = is_worst & (best_block == leaving[:, None]) & (top > worst)[:, None]
            best_score = jnp.where(is_hit, top[:, None], best_score)
            best_block = jnp.where(is_hit, (step * panel + top_place)[:, None], best_block)
            score = jnp.where(column == top_place[:, None], -jnp.inf, score)
            return is_better(score, best_score), score, best_score, best_block

        state = is_better(score, best[0]), score, *best
        return lax.while_loop(lambda state: state[0], extract, state)[2:]

    # Places behind the last are taken from the start, by something that nothing beats.
    empty = jnp.where(slot < top_k, -jnp.inf, jnp.inf), _NO_BLOCK + slot
    best_score, best_block = loop(begin, end, merge, empty)

    def write(rank: jax.Array, best_score: jax.Array) -> jax.Array:
        top = best_score.max(1)
        block = jnp.where(best_score == top[:, None], best_block, _NO_BLOCK + places).min(1)
        entry = (row * num_queries + place) * top_k + rank
        store_numbers(indices_ref, entry, is_query, jnp.where(top == -jnp.inf, -1, block))
        return jnp.where(best_block == block[:, None], -jnp.inf, best_score)

    loop(0, top_k, write, jnp.where(slot < top_k, best_score, -jnp.inf))


def block_means(
    key: jax.Array,
    blocks: Blocks,
    *,
    config: TritonConfig,
    interpret: bool = False,
) -> jax.Array:
    """Mean key of every block: the sum of its keys / their number, in float32.

    Args: as of `route`.

    Returns:
      float32 `[batch, kv_heads, blocks, head_dim]`; zero for a block that does not exist.
    """
    batch, num_keys, kv_heads, head_dim = key.shape
    num_blocks = blocks.num_blocks
    keys = min(config.means_keys, power_of_two(blocks.block_size))
    at_once = min(config.means_keys // keys, power_of_two(num_blocks))
    means = pl.pallas_call(
        functools.partial(
            _means_kernel, num_keys=num_keys, kv_heads=kv_heads, num_blocks=num_blocks, blocks=at_once, keys=keys
        ),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads * num_blocks, head_dim), jnp.float32),
        grid=(ceil_div(num_blocks, at_once), batch * kv_heads),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=config.num_stages),
        name="moba_block_means",
        interpret=interpret,
    )(key.reshape(-1, head_dim), blocks.block_start.reshape(-1), blocks.block_length.reshape(-1))
    return means.reshape(batch, kv_heads, num_blocks, head_dim)


def _means_kernel(
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    start_ref: Any,  # [batch * blocks]
    length_ref: Any,  # [batch * blocks]
    mean_ref: Any,  # [batch * kv_heads * blocks, head_dim]
    *,
    num_keys: int,
    kv_heads: int,
    num_blocks: int,
    blocks: int,
    keys: int,
) -> None:
    row = pl.program_id(1)
    batch_row, head = divide(row, kv_heads)
    columns = padded_head_dim(key_ref.shape[-1])
    block = pl.program_id(0) * blocks + iota(blocks)
    is_block = block < num_blocks
    start = load_numbers(start_ref, batch_row * num_blocks + block, is_block)  # [blocks]
    length = load_numbers(length_ref, batch_row * num_blocks + block, is_block)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        rank = step * keys + lax.broadcasted_iota(jnp.int32, (blocks, keys), 1)
        key_row = (batch_row * num_keys + start[:, None] + rank) * kv_heads + head
        key = load_rows(key_ref, key_row, rank < length[:, None], columns)  # [blocks, keys, head_dim]
        return total + key.astype(jnp.float32).sum(1)

    total = loop(0, ceil_div(length.max(), keys), add, jnp.zeros((blocks, columns), jnp.float32))
    mean = total / jnp.maximum(length, 1).astype(jnp.float32)[:, None]
    store_rows(mean_ref, row * num_blocks + block, is_block, mean)
