"""MoBA's router on a TPU: means of key blocks, and every query's exact best blocks, without a table of all scores.

Two kernels. Neither writes anything that grows with queries x blocks.

Means. Grid (batch, kv head, group of 128 blocks, step). A step adds the keys of one tile of 1024 rows to the sums of
one group: sums [128, head_dim] += member^T keys, where member [1024, 128] is 1 where a row lies in a block. Blocks may
thus start anywhere and have any length, packed sequences included. The tiles that a group touches are consecutive and
known before (scalar prefetch); the pipeline fetches them, and a step without a tile fetches and computes nothing. The
sums stay in VMEM over the steps of a group. Groups behind the last block that exists are not visited (dynamic grid),
and hold whatever the memory held. Each key is read once and costs one row of a [128, 128] product: bound by memory.

Scores and choice. Grid (batch, query head, tile of 512 queries, step). A step takes a stretch of 256 blocks, the means
[256, head_dim] and the queries [512, head_dim] in VMEM, and computes scores [256, 512] in float32 at highest precision:
blocks along sublanes and queries along lanes, so that a maximum over blocks is elementwise and whatever is kept per
query is a row of lanes. The best so far, [top_k, 512] scores and ids in falling order, stays in VMEM over the steps.
A stretch is merged by repeated extraction: take each query's best remaining block, insert it into the list at its place
(compare, shift by one sublane, select), strike it out, and stop when no query's next best beats the last of its list.
Order gives the tie rule: stretches rise, extraction takes the lowest id among equals, insertion goes behind equals.
A tile visits only the stretches that one of its queries may see (scalar prefetch); other steps compute nothing.
An extraction reads every score once, about eight operations each, and a stretch takes at most top_k of them, later ones
fewer; the product takes three (bfloat16) or six passes of the MXU: bound by the vector unit from a top_k of about 4 on.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Tile sizes of the routing kernels; each a multiple of 128."""

    key_rows: int = 1024  # keys that a step of the means reads
    queries: int = 512  # queries of a tile
    blocks: int = 256  # blocks of a stretch

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < _LANES or size % _LANES:
                raise ValueError(f"{name} must be a positive multiple of {_LANES}, got {name}={size}")


DEFAULT = RoutingConfig()


def route(
    query: jax.Array,
    key: jax.Array,
    *,
    block_start: jax.Array,
    block_length: jax.Array,
    first_block: jax.Array,
    last_block: jax.Array,
    block_size: int,
    top_k: int,
    is_causal: bool,
    config: RoutingConfig = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """The blocks that each query chooses: the `top_k` largest scores, score = query . mean(keys of the block).

    Means, products and sums are float32. Ties go to the lower block index, and 0 equals -0. Causal: the own block,
    which is last_block, is always chosen and comes first. Sources: MoBA (arXiv 2502.13189), section 2.

    Args:
      query: float32 or bfloat16 `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` of query's dtype, in block order, padding zero; heads is a multiple of
        kv_heads.
      block_start: int32 `[batch, blocks]`, place of a block's first key, not falling.
      block_length: int32 `[batch, blocks]`, keys in the block, at most block_size; 0 where there is no such block.
      first_block: int32 `[batch, queries]`, the first block that a query may choose.
      last_block: int32 `[batch, queries]`, the last one; below first_block for a query that may choose none.
      block_size: keys in a full block.
      top_k: blocks that a query may choose, at most the number of blocks.
      is_causal: whether last_block is forced.
      config: tile sizes.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      int32 `[batch, heads, queries, top_k]`: the own block first (causal), then by falling score; -1 for none.

    Raises:
      NotImplementedError: query has another dtype.
    """
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU router takes float32 and bfloat16, got query.dtype={query.dtype}")
    means = block_means(
        key,
        block_start=block_start,
        block_length=block_length,
        block_size=block_size,
        config=config,
        interpret=interpret,
    )
    batch, num_queries, num_heads, head_dim = query.shape
    _, kv_heads, num_blocks, _ = means.shape
    tile = min(config.queries, _round_up(num_queries, _LANES))
    padding = -num_queries % tile
    num_tiles = (num_queries + padding) // tile
    stretch = min(config.blocks, num_blocks)
    query = jnp.pad(query.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
    first_block = jnp.pad(first_block, ((0, 0), (0, padding)))  # [batch, queries]
    last_block = jnp.pad(last_block, ((0, 0), (0, padding)), constant_values=-1)  # [batch, queries]

    # Which stretches a tile reaches. The grid has as many steps as the tile that reaches most.
    is_reached = first_block <= last_block
    begin = jnp.where(is_reached, first_block, num_blocks - 1).reshape(batch, num_tiles, tile).min(2) // stretch
    end = jnp.where(is_reached, last_block, -1).reshape(batch, num_tiles, tile).max(2) // stretch + 1
    num_steps = jnp.maximum((end - begin).max(), 1)
    list_rows = _round_up(top_k, _SUBLANES)

    def tile_of_means(
        b: jax.Array, h: jax.Array, t: jax.Array, step: jax.Array, begin: Any, end: Any
    ) -> tuple[Any, ...]:
        last = jnp.maximum(end[b * num_tiles + t] - 1, 0)
        return b, lax.div(h, num_heads // kv_heads), jnp.minimum(begin[b * num_tiles + t] + step, last), 0

    indices = pl.pallas_call(
        functools.partial(_route_kernel, num_tiles=num_tiles, top_k=top_k, is_causal=is_causal),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, list_rows, num_queries + padding), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, num_tiles, num_steps),
            in_specs=[
                pl.BlockSpec((1, 1, tile, head_dim), lambda b, h, t, *_: (b, h, t, 0)),
                pl.BlockSpec((1, 2, tile), lambda b, h, t, *_: (b, 0, t)),
                pl.BlockSpec((1, 1, stretch, head_dim), tile_of_means),
            ],
            out_specs=pl.BlockSpec((1, 1, list_rows, tile), lambda b, h, t, *_: (b, h, 0, t)),
            scratch_shapes=[
                pltpu.VMEM((stretch, tile), jnp.float32),
                pltpu.VMEM((1, tile), jnp.float32),
                pltpu.VMEM((_SUBLANES + list_rows, tile), jnp.float32),
                pltpu.VMEM((_SUBLANES + list_rows, tile), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=32 << 20,
        ),
        name="moba_route",
        interpret=interpret,
    )(begin.reshape(-1), end.reshape(-1), query, jnp.stack([first_block, last_block], axis=1), means)
    return indices[:, :, :top_k, :num_queries].swapaxes(2, 3)


def _route_kernel(
    begin_ref: Any,  # SMEM [batch * tiles]
    end_ref: Any,  # SMEM [batch * tiles]
    query_ref: Any,  # [1, 1, queries, head_dim]
    reach_ref: Any,  # [1, 2, queries]: first block, last block
    mean_ref: Any,  # [1, 1, blocks, head_dim]
    indices_ref: Any,  # [1, 1, list_rows, queries]
    score_ref: Any,  # [blocks, queries], of the current stretch
    next_ref: Any,  # [1, queries], the largest of them
    best_score_ref: Any,  # [8 + list_rows, queries]; infinite in the first 8 rows, then the list
    best_block_ref: Any,  # [8 + list_rows, queries]
    *,
    num_tiles: int,
    top_k: int,
    is_causal: bool,
) -> None:
    tile_index = pl.program_id(0) * num_tiles + pl.program_id(2)
    step = pl.program_id(3)
    stretch = begin_ref[tile_index] + step
    num_blocks, num_queries = score_ref.shape
    list_rows = best_score_ref.shape[0] - _SUBLANES
    rows = pl.ds(_SUBLANES, list_rows)

    @pl.when(step == 0)
    def _() -> None:
        row = lax.broadcasted_iota(jnp.int32, best_score_ref.shape, 0)
        best_score_ref[...] = jnp.where(row < _SUBLANES, jnp.inf, -jnp.inf)
        best_block_ref[...] = jnp.full(best_block_ref.shape, -1)

    def extract(_: Any) -> jax.Array:
        """Moves every query's best block of the stretch to its place in the list; whether there is more to move."""
        score, best = score_ref[...], next_ref[...]
        # Places as float32, whose minimum is one operation; that of integers is two.
        place = lax.broadcasted_iota(jnp.int32, score.shape, 0).astype(jnp.float32)
        best_place = jnp.where(score == best, place, float(num_blocks)).min(0, keepdims=True)  # [1, queries]
        set_scores(jnp.where(place == best_place, -jnp.inf, score))

        before = pl.ds(_SUBLANES - 1, list_rows)
        kept, kept_before = best_score_ref[rows], best_score_ref[before]  # [list_rows, queries]
        block, block_before = best_block_ref[rows], best_block_ref[before]
        stays, is_behind = kept >= best, kept_before < best
        best_score_ref[rows] = jnp.where(stays, kept, jnp.where(is_behind, kept_before, best))
        new_block = stretch * num_blocks + best_place.astype(jnp.int32)
        best_block_ref[rows] = jnp.where(stays, block, jnp.where(is_behind, block_before, new_block))
        return is_better()

    def set_scores(score: jax.Array) -> None:
        score_ref[...] = score
        next_ref[...] = score.max(0, keepdims=True)

    def is_better() -> jax.Array:
        """Whether some query has a block in the stretch that beats the last of its list."""
        last = best_score_ref[pl.ds(_SUBLANES + top_k - 1, 1)]  # [1, queries]
        return jnp.where(next_ref[...] > last, 1.0, 0.0).max() > 0

    @pl.when(stretch < end_ref[tile_index])
    def _() -> None:
        block = stretch * num_blocks + lax.broadcasted_iota(jnp.int32, (num_blocks, num_queries), 0)
        first, last = reach_ref[0, 0:1], reach_ref[0, 1:2]  # [1, queries]
        score = _scores(mean_ref[0, 0], query_ref[0, 0])
        if is_causal:
            score = jnp.where(block == last, jnp.inf, score)
        set_scores(jnp.where((first <= block) & (block <= last), score, -jnp.inf))
        lax.while_loop(lambda is_more: is_more, extract, is_better())

    indices_ref[0, 0] = jnp.where(best_score_ref[rows] == -jnp.inf, -1, best_block_ref[rows])


def _scores(mean: jax.Array, query: jax.Array) -> jax.Array:
    """Products of means `[blocks, head_dim]` and queries `[queries, head_dim]`, exact and added in float32.

    The MXU multiplies bfloat16. Three such numbers hold a float32, so bfloat16 queries need three passes, float32 six.
    """
    if query.dtype == jnp.float32:
        return _product(mean, query, lax.Precision.HIGHEST)
    score = jnp.zeros((mean.shape[0], query.shape[0]), jnp.float32)
    for _ in range(3):
        leading = mean.astype(query.dtype)
        score += _product(leading, query, None)
        mean -= leading.astype(jnp.float32)
    return score


def _product(mean: jax.Array, query: jax.Array, precision: lax.Precision | None) -> jax.Array:
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(mean, query, dimensions, precision=precision, preferred_element_type=jnp.float32)


def block_means(
    key: jax.Array,
    *,
    block_start: jax.Array,
    block_length: jax.Array,
    block_size: int,
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
    num_blocks = block_start.shape[1]
    padding = -num_blocks % (_LANES if num_blocks <= _LANES else config.blocks)
    num_groups = (num_blocks + padding) // _LANES
    key_rows = min(config.key_rows, _round_up(num_keys, _LANES))
    num_tiles = -(-num_keys // key_rows)
    key = jnp.pad(key.swapaxes(1, 2), ((0, 0), (0, 0), (0, num_tiles * key_rows - num_keys), (0, 0)))
    block_start = jnp.pad(block_start, ((0, 0), (0, padding)), constant_values=num_keys)
    block_length = jnp.pad(block_length, ((0, 0), (0, padding)))
    block_stop = block_start + block_length  # [batch, blocks]

    # The tiles of keys that a group of blocks touches, and the groups in which there is a block at all.
    first_tile = block_start[:, ::_LANES] // key_rows  # [batch, groups]
    group_stop = jnp.where(block_length > 0, block_stop, 0).reshape(batch, num_groups, _LANES).max(2)
    tile_stop = -(-group_stop // key_rows)  # [batch, groups]
    groups_in_use = jnp.maximum((group_stop > 0).sum(1).max(), 1)
    num_steps = min(_LANES * block_size // key_rows + 2, num_tiles)

    def tile_of_keys(b: jax.Array, h: jax.Array, g: jax.Array, step: jax.Array, first: Any, stop: Any) -> tuple:
        last = jnp.maximum(stop[b * num_groups + g] - 1, 0)
        return b, h, jnp.minimum(first[b * num_groups + g] + step, last), 0

    total = pl.pallas_call(
        functools.partial(_means_kernel, num_groups=num_groups),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, num_blocks + padding, head_dim), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, groups_in_use, num_steps),
            in_specs=[
                pl.BlockSpec((1, 2, _LANES), lambda b, h, g, *_: (b, 0, g)),
                pl.BlockSpec((1, 1, key_rows, head_dim), tile_of_keys),
            ],
            out_specs=pl.BlockSpec((1, 1, _LANES, head_dim), lambda b, h, g, *_: (b, h, g, 0)),
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
        place = tile * key.shape[0] + lax.broadcasted_iota(jnp.int32, (key.shape[0], _LANES), 0)
        start, stop = bounds_ref[0, 0:1], bounds_ref[0, 1:2]  # [1, 128]
        member = jnp.where((start <= place) & (place < stop), 1.0, 0.0).astype(key.dtype)
        total_ref[0, 0] += lax.dot_general(
            member,
            key,
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST if key.dtype == jnp.float32 else None,  # 1 and 0 are exact in any case
            preferred_element_type=jnp.float32,
        )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
