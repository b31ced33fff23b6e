"""MoBA's router on a TPU: means of key blocks, and every query's exact best blocks, without a table of all scores.

Two kernels. Neither writes anything that grows with queries x blocks.

Means. Grid (batch, kv head, group of 128 blocks, step). A step adds the keys of one tile of 1024 rows to the sums of
one group: sums [128, head_dim] += member^T keys, where member [1024, 128] is 1 where a row lies in a block. Blocks may
thus start anywhere and have any length, packed sequences included. The tiles that a group touches are consecutive and
known before (scalar prefetch); the pipeline fetches them, and a step without a tile fetches and computes nothing. The
sums stay in VMEM over the steps of a group. Groups behind the last block that exists are not visited (dynamic grid),
and hold whatever the memory held. Each key is read once and costs one row of a [128, 128] product: bound by memory.

Scores and choice. Grid (batch, query head, tile of 512 queries, step). A step takes a panel of 256 blocks, the means
[256, head_dim] and the queries [512, head_dim] in VMEM, and computes scores [256, 512] in float32 at highest precision:
blocks along sublanes and queries along lanes, so that a maximum over blocks is elementwise and whatever is kept per
query is a row of lanes. The best so far, [top_k, 512] scores and ids in falling order, stays in VMEM over the steps.
The MXU multiplies bfloat16, and three such numbers hold a float32: for bfloat16 queries the pieces of the means lie
side by side, [256, 3 head_dim], against the queries three times, and one product adds them up.

A panel is merged in two parts. Sort: four consecutive blocks are a column; exchanges of neighbours sort it for every
query. Columns lie along sublanes, their four levels in four arrays [64, 512] (rows of the means are reordered for
that), so that an exchange is elementwise. One word a column and query holds the column's number and the order of its
four. Extract: take each query's best among the heads of its columns, insert it into the list at its place (compare,
shift by one sublane, select), and pop its column. This is done as often as some query has blocks above the last of its
list, at most top_k times, as counted after the sort: a test after each extraction would save few, but each time wait
some 200 cycles for a number to come from the vector to the scalar unit. The first extraction hides half of that wait.
Order gives the tie rule: panels rise, the sort is stable, extraction takes the lowest column among equals, insertion
goes behind equals. A tile visits only the panels that one of its queries may see, and masks only those that some
query sees in part or is forced into (scalar prefetch); other steps compute nothing.
The sort takes some twelve operations a score, an extraction fourteen for each head: bound by the vector unit, apart
from a wait of some 200 cycles for the product's first rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks
from pallas_kernels.numerics import NT, TN, product, result
from pallas_kernels.tpu.per_query.memory import LANES, round_up

_SUBLANES = 8
_LEVELS = 4  # blocks of a column
_FLOAT_BITS = 0x4B000000  # of 2**23; an integer below 2**23 added to them makes the float32 of 2**23 + integer
_NO_WORD = 2.0**24


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Tile sizes of the routing kernels."""

    key_rows: int = 1024  # keys that a step of the means reads, a multiple of 16
    queries: int = 512  # queries of a tile, a multiple of 128
    blocks: int = 256  # blocks of a panel: 32, 64 or a multiple of 128

    def __post_init__(self) -> None:
        for name, multiple in (("key_rows", 16), ("queries", LANES), ("blocks", LANES)):
            size = getattr(self, name)
            if (size < 1 or size % multiple) and (name, size) not in (("blocks", 32), ("blocks", 64)):
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {name}={size}")


DEFAULT = RoutingConfig()


def refuses(query: jax.Array) -> str | None:
    """Why the router cannot do a call; None if it can."""
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU router takes float32 and bfloat16, got query.dtype={query.dtype}"
    return None


def route(
    query: jax.Array,
    key: jax.Array,
    blocks: Blocks,
    *,
    top_k: int,
    is_causal: bool,
    config: RoutingConfig = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """The blocks that each query chooses: the `top_k` largest scores, score = query . mean(keys of the block).

    Means, products and sums are float32. Ties go to the lower block index, and 0 equals -0. Causal: the own block,
    which is `blocks.last_block`, is always chosen and comes first. Sources: MoBA (arXiv 2502.13189), section 2.

    Args:
      query: float32 or bfloat16 `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` of query's dtype, in block order, padding zero; heads is a multiple of
        kv_heads.
      blocks: the geometry of the call.
      top_k: blocks that a query may choose, at most the number of blocks.
      is_causal: whether the own block is forced.
      config: tile sizes.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      int32 `[batch, heads, queries, top_k]`: the own block first (causal), then by falling score; -1 for none.

    Raises:
      NotImplementedError: query has another dtype.
    """
    if (reason := refuses(query)) is not None:
        raise NotImplementedError(reason)
    means = block_means(key, blocks, config=config, interpret=interpret)
    batch, num_queries, num_heads, head_dim = query.shape
    _, kv_heads, num_blocks, _ = means.shape
    means = _by_levels(means)
    if query.dtype == jnp.bfloat16:
        means = _in_pieces(means)
    tile = min(config.queries, round_up(num_queries, LANES))
    padding = -num_queries % tile
    num_tiles = (num_queries + padding) // tile
    panel = min(config.blocks, round_up(blocks.num_blocks, _LEVELS * _SUBLANES))
    query = jnp.pad(query.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
    first_block = jnp.pad(blocks.first_block, ((0, 0), (0, padding)))  # [batch, queries]
    last_block = jnp.pad(blocks.last_block, ((0, 0), (0, padding)), constant_values=-1)  # [batch, queries]

    # Which panels a tile reaches, and which blocks all its queries see and are not forced into. The grid has as
    # many steps as the tile that reaches most.
    has_blocks = first_block <= last_block
    of_tiles = batch, num_tiles, tile
    begin = jnp.where(has_blocks, first_block, num_blocks - 1).reshape(of_tiles).min(2) // panel
    end = jnp.where(has_blocks, last_block, -1).reshape(of_tiles).max(2) // panel + 1
    plain_begin = first_block.reshape(of_tiles).max(2)
    plain_end = last_block.reshape(of_tiles).min(2) + (0 if is_causal else 1)
    bounds = jnp.stack([begin, end, plain_begin, plain_end], axis=2)  # [batch, tiles, 4]
    num_steps = jnp.maximum((end - begin).max(), 1)
    list_rows = round_up(top_k, _SUBLANES)

    def tile_of_means(b: jax.Array, h: jax.Array, t: jax.Array, step: jax.Array, bounds: Any) -> tuple[Any, ...]:
        at = (b * num_tiles + t) * 4
        last = jnp.maximum(bounds[at + 1] - 1, 0)
        return b, lax.div(h, num_heads // kv_heads), jnp.minimum(bounds[at] + step, last), 0

    indices = pl.pallas_call(
        functools.partial(_route_kernel, num_tiles=num_tiles, top_k=top_k, is_causal=is_causal),
        out_shape=result((batch, num_heads, list_rows, num_queries + padding), jnp.int32, query),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, num_tiles, num_steps),
            in_specs=[
                pl.BlockSpec((1, 1, tile, head_dim), lambda b, h, t, *_: (b, h, t, 0)),
                pl.BlockSpec((1, 2, tile), lambda b, h, t, *_: (b, 0, t)),
                pl.BlockSpec((1, 1, panel, means.shape[3]), tile_of_means),
            ],
            out_specs=pl.BlockSpec((1, 1, list_rows, tile), lambda b, h, t, *_: (b, h, 0, t)),
            scratch_shapes=[
                pltpu.VMEM((_LEVELS, panel // _LEVELS, tile), jnp.float32),
                pltpu.VMEM((panel // _LEVELS, tile), jnp.float32),
                pltpu.VMEM((1, tile), jnp.float32),
                pltpu.VMEM((list_rows, tile), jnp.float32),
                pltpu.VMEM((list_rows, tile), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=32 << 20,
        ),
        name="moba_route",
        interpret=interpret,
    )(bounds.reshape(-1), query, jnp.stack([first_block, last_block], axis=1), means)
    return indices[:, :, :top_k, :num_queries].swapaxes(2, 3)


def _by_levels(means: jax.Array) -> jax.Array:
    """Reorders rows `[..., blocks, head_dim]`, in each 32: the first blocks of eight columns, the second ones, ..."""
    columns = means.reshape(*means.shape[:2], -1, _SUBLANES, _LEVELS, means.shape[3])
    return columns.swapaxes(3, 4).reshape(means.shape)


def _in_pieces(means: jax.Array) -> jax.Array:
    """Three bfloat16 pieces that add up to each float32, side by side: `[..., head_dim]` to `[..., 3 * head_dim]`."""
    pieces = []
    for _ in range(3):
        pieces.append(lax.reduce_precision(means, 8, 7))  # XLA may leave out a conversion there and back, not this
        means -= pieces[-1]
    return jnp.concatenate(pieces, axis=3).astype(jnp.bfloat16)


def _route_kernel(
    bounds_ref: Any,  # SMEM [batch * tiles * 4]: panels from, to; blocks that all queries see unforced, from, to
    query_ref: Any,  # [1, 1, queries, head_dim]
    block_range_ref: Any,  # [1, 2, queries]: first block, last block
    mean_ref: Any,  # [1, 1, blocks, head_dim or three times that], by levels
    indices_ref: Any,  # [1, 1, list_rows, queries]
    score_ref: Any,  # [4, columns, queries], of the current panel; falling in a column
    word_ref: Any,  # [columns, queries], 2**23 + column * 256 + levels that are left, two bits each, best lowest
    next_ref: Any,  # [1, queries], the largest score
    best_score_ref: Any,  # [list_rows, queries], falling
    best_block_ref: Any,  # [list_rows, queries]
    *,
    num_tiles: int,
    top_k: int,
    is_causal: bool,
) -> None:
    at = (pl.program_id(0) * num_tiles + pl.program_id(2)) * 4
    step = pl.program_id(3)
    panel = bounds_ref[at] + step
    num_columns, num_queries = word_ref.shape
    first_block = panel * (_LEVELS * num_columns)
    groups = [pl.ds(column, _SUBLANES) for column in range(0, num_columns, _SUBLANES)]

    @pl.when(step == 0)
    def _() -> None:
        best_score_ref[...] = jnp.full(best_score_ref.shape, -jnp.inf)
        best_block_ref[...] = jnp.full(best_block_ref.shape, -1)

    def sort(is_cut: bool) -> jax.Array:
        """Fills score_ref, word_ref and next_ref; how many extractions are enough for every query."""
        mean, query = mean_ref[0, 0], query_ref[0, 0]
        query = jnp.concatenate([query] * (mean.shape[1] // query.shape[1]), axis=1)  # against each piece of the means
        scores = product(mean, query, NT)  # [blocks, queries]; products of bfloat16 are exact
        first, last = (block_range_ref[0, row : row + 1] - first_block for row in range(2))  # [1, queries]
        threshold = best_score_ref[top_k - 1 : top_k]  # [1, queries]
        row = lax.broadcasted_iota(jnp.int32, (_SUBLANES, num_queries), 0)
        largest = jnp.full(row.shape, -jnp.inf)
        better = jnp.zeros(row.shape, jnp.float32)
        for number, group in enumerate(groups):
            begin = number * _LEVELS * _SUBLANES
            score = [scores[begin + level * _SUBLANES :][:_SUBLANES] for level in range(_LEVELS)]
            for level in range(_LEVELS if is_cut else 0):
                block = begin + _LEVELS * row + level
                forced = jnp.where(block == last, jnp.inf, score[level]) if is_causal else score[level]
                score[level] = jnp.where((first <= block) & (block <= last), forced, -jnp.inf)
            score, levels = _sort_columns(score)
            for level in range(_LEVELS):
                score_ref[level, group] = score[level]
            word = (row + number * _SUBLANES) * 256 + levels + _FLOAT_BITS
            word_ref[group] = lax.bitcast_convert_type(word, jnp.float32)
            largest = jnp.maximum(largest, score[0])
            pair = jnp.where(score[1] > threshold, 2.0, jnp.where(score[0] > threshold, 1.0, 0.0))
            better += jnp.where(score[2] > threshold, 4.0, pair)
        next_ref[...] = largest.max(0, keepdims=True)
        return jnp.minimum(better.sum(0, keepdims=True).max(), top_k).astype(jnp.int32)

    def extract(_: Any, carry: None) -> None:
        """Moves every query's best block of the panel to its place in the list, or behind the last."""
        best = next_ref[...]
        word = jnp.full((_SUBLANES, num_queries), _NO_WORD)
        for group in groups:
            word = jnp.minimum(word, jnp.where(score_ref[0, group] == best, word_ref[group], _NO_WORD))
        word = word.min(0, keepdims=True)  # [1, queries]
        bits = lax.bitcast_convert_type(word, jnp.int32)
        popped = lax.bitcast_convert_type((bits & ~255) | ((bits & 255) >> 2), jnp.float32)
        largest = jnp.full((_SUBLANES, num_queries), -jnp.inf)
        for group in groups:
            is_taken = word_ref[group] == word
            score = [score_ref[level, group] for level in range(_LEVELS)] + [-jnp.inf]
            for level in range(_LEVELS):
                score_ref[level, group] = jnp.where(is_taken, score[level + 1], score[level])
            largest = jnp.maximum(largest, jnp.where(is_taken, score[1], score[0]))
            word_ref[group] = jnp.where(is_taken, popped, word_ref[group])
        next_ref[...] = largest.max(0, keepdims=True)
        column = (bits & 0x7FFFFF) >> 8  # libtpu fails to compile bits - _FLOAT_BITS
        insert(best, first_block + _LEVELS * column + (bits & 3))
        return carry

    def insert(score: jax.Array, block: jax.Array) -> None:
        """Puts scores and blocks `[1, queries]` into the list, behind equals; the last row falls out."""
        kept, kept_block = best_score_ref[...], best_block_ref[...]
        is_first = lax.broadcasted_iota(jnp.int32, kept.shape, 0) == 0
        before, before_block = jnp.where(is_first, jnp.inf, pltpu.roll(kept, 1, 0)), pltpu.roll(kept_block, 1, 0)
        best_score_ref[...] = jnp.maximum(kept, jnp.minimum(before, score))
        moved = jnp.where(before >= score, block, before_block)
        best_block_ref[...] = jnp.where(kept >= score, kept_block, moved)

    def merge(is_cut: bool) -> None:
        number = sort(is_cut)
        extract(0, None)
        lax.fori_loop(1, number, extract, None)

    @pl.when(panel < bounds_ref[at + 1])
    def _() -> None:
        is_cut = (first_block < bounds_ref[at + 2]) | (bounds_ref[at + 3] < first_block + _LEVELS * num_columns)
        lax.cond(is_cut, lambda: merge(True), lambda: merge(False))

    indices_ref[0, 0] = jnp.where(best_score_ref[...] == -jnp.inf, -1, best_block_ref[...])


def _sort_columns(score: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Sorts four arrays elementwise, falling and stable; which array each came from, two bits each, best lowest."""
    score = list(score)
    level = [jnp.full(score[0].shape, number) for number in range(_LEVELS)]
    for turn in range(_LEVELS):
        for low in range(turn % 2, _LEVELS - 1, 2):
            pair = slice(low, low + 2)
            is_less = score[low] < score[low + 1]
            score[pair] = jnp.maximum(*score[pair]), jnp.minimum(*score[pair])
            above, below = level[pair]
            level[pair] = jnp.where(is_less, below, above), jnp.where(is_less, above, below)
    return score, functools.reduce(lambda levels, number: levels * 4 + number, reversed(level))


def block_means(
    key: jax.Array,
    blocks: Blocks,
    *,
    config: RoutingConfig = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """Mean key of every block: the sum of its keys / their number, in float32.

    Args: as of `route`.

    Returns:
      float32 `[batch, kv_heads, blocks, head_dim]`, the number of blocks rounded up to a multiple of 128, or of
      config.blocks if above that. Zero for a block that does not exist among the groups of 128 in which one does,
      anything behind them.
    """
    batch, num_keys, kv_heads, head_dim = key.shape
    num_blocks = blocks.num_blocks
    padding = -num_blocks % (LANES if num_blocks <= LANES else max(config.blocks, LANES))
    num_groups = (num_blocks + padding) // LANES
    key_rows = min(config.key_rows, round_up(num_keys, LANES))
    num_tiles = -(-num_keys // key_rows)
    key = jnp.pad(key.swapaxes(1, 2), ((0, 0), (0, 0), (0, num_tiles * key_rows - num_keys), (0, 0)))
    block_start = jnp.pad(blocks.block_start, ((0, 0), (0, padding)), constant_values=num_keys)
    block_length = jnp.pad(blocks.block_length, ((0, 0), (0, padding)))
    block_stop = block_start + block_length  # [batch, blocks]

    # The tiles of keys that a group of blocks touches, and the groups in which there is a block at all.
    first_tile = block_start[:, ::LANES] // key_rows  # [batch, groups]
    group_stop = jnp.where(block_length > 0, block_stop, 0).reshape(batch, num_groups, LANES).max(2)
    tile_stop = -(-group_stop // key_rows)  # [batch, groups]
    groups_in_use = jnp.maximum((group_stop > 0).sum(1).max(), 1)
    num_steps = min(LANES * blocks.block_size // key_rows + 2, num_tiles)

    def tile_of_keys(b: jax.Array, h: jax.Array, g: jax.Array, step: jax.Array, first: Any, stop: Any) -> tuple:
        last = jnp.maximum(stop[b * num_groups + g] - 1, 0)
        return b, h, jnp.minimum(first[b * num_groups + g] + step, last), 0

    total = pl.pallas_call(
        functools.partial(_means_kernel, num_groups=num_groups),
        out_shape=result((batch, kv_heads, num_blocks + padding, head_dim), jnp.float32, key),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, groups_in_use, num_steps),
            in_specs=[
                pl.BlockSpec((1, 2, LANES), lambda b, h, g, *_: (b, 0, g)),
                pl.BlockSpec((1, 1, key_rows, head_dim), tile_of_keys),
            ],
            out_specs=pl.BlockSpec((1, 1, LANES, head_dim), lambda b, h, g, *_: (b, h, g, 0)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        name="moba_block_means",
        interpret=interpret,
    )(first_tile.reshape(-1), tile_stop.reshape(-1), jnp.stack([block_start, block_stop], axis=1), key)
    return total / jnp.maximum(block_length, 1)[:, None, :, None]


def _means_kernel(
    first_tile_ref: Any,  # SMEM [batch * groups]
    tile_stop_ref: Any,  # SMEM [batch * groups]
    bounds_ref: Any,  # [1, 2, 128]: first place of a block, one past the last
    key_ref: Any,  # [1, 1, key_rows, head_dim]
    total_ref: Any,  # [1, 1, 128, head_dim]
    *,
    num_groups: int,
) -> None:
    group = pl.program_id(0) * num_groups + pl.program_id(2)
    step = pl.program_id(3)
    tile = first_tile_ref[group] + step

    @pl.when(step == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(tile < tile_stop_ref[group])
    def _() -> None:
        key = key_ref[0, 0]
        place = tile * key.shape[0] + lax.broadcasted_iota(jnp.int32, (key.shape[0], LANES), 0)
        start, stop = bounds_ref[0, 0:1], bounds_ref[0, 1:2]  # [1, 128]
        member = jnp.where((start <= place) & (place < stop), 1.0, 0.0).astype(key.dtype)
        total_ref[0, 0] += product(member, key, TN)  # 1 and 0 are exact in any case
