"""PSA: the better a key block, the finer it is read: exactly, as means of 2, 4 or 8 keys, or not at all.

Paper: PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation (arXiv 2512.04025). Not causal;
training-free, or used while a model is distilled into few steps. A quarter of the tokens of every block, drawn at
random, the same places in all blocks, scores pairs of blocks by exact attention. Of every row's ranking the best get
level 1, the next 2, 4 and 8, the rest 0: at level h a block is attended as means of h keys and values that count h
times each. Key blocks whose neighbours differ may be kept from high levels.

Defaults: those of the authors' configuration class. They ship energy bounds .4, .5, .6, .8 for Wan2.1-14B, and .5, .6,
.7, .8 with similarity_thresholds .7, .65, .6 for 1.3B, all with key blocks of 128, and draw anew at every call. Video
tokens come along `order.space_filling_curve`, text behind them: hidden states may be permuted once for all layers.

Where code and paper disagree, the authors' code (ziplab/Pyramid-Sparse-Attention at be122cf) is followed: scores are
`score.peaks`, not a pooled softmax; bands are whole tiles. Corrected, with `as_published` for their numbers: a ragged
row is filled with copies of its last token, which levels above 1 count; where two blocks of a level do not fill a tile,
their newer kernel fills it with means of the row's first keys. Their newer modes ignore text_length.
"""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from sparse_attn.checks import (
    check_attention,
    check_integers,
    check_not_negative,
    check_positive,
    check_self_attention,
)
from sparse_attn.grammar import choose, describe, rest, score
from sparse_attn.merge import Partial, merge
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="PSA",
    paper="2512.04025",
    order="space-filling curve",
    blocks="128 / 64",
    describe="a quarter of the tokens, at random",
    score="how near the best sampled logit of a block comes to the row's best",
    choose="per query block and head: bands of the ranking, by rank or energy; capped by similarity of neighbours",
    rest="means of 2, 4 or 8 keys and values, plus log 2, 4 or 8",
    when="dense in the first 12 to 15 denoising steps",
    is_trainable=True,
)

Offsets = tuple[jax.Array, jax.Array]
Rule = Literal["rank", "energy"]
_LEVELS = (1, 2, 4, 8)


def draw_offsets(
    random_key: jax.Array, query: jax.Array, key: jax.Array, *, query_block_size: int = 128, key_block_size: int = 64
) -> Offsets:
    """Places of the sampled tokens in a block, int32 `[batch, heads, size // 4]` for queries, likewise for keys."""
    query_key, key_key = jax.random.split(random_key)
    places = describe.draw_places(query_key, query, query_block_size, query_block_size // 4)
    return places, describe.draw_places(key_key, key, key_block_size, key_block_size // 4)


@splits_over_mesh("bh", offsets=("bh", "bk"))
def select(
    query: jax.Array,
    key: jax.Array,
    offsets: Offsets,
    *,
    query_block_size: int = 128,
    key_block_size: int = 64,
    rule: Rule = "rank",
    bounds: tuple[float, float, float, float] = (0.1, 0.15, 0.15, 0.35),
    similarity_thresholds: tuple[float, float, float] | None = None,
    text_length: int = 0,
    tile_size: int = 32,
    least_exact_share: float = 0.06,
    as_published: bool = False,
    scale: float | None = None,
) -> LevelMap:
    """The level of every pair of blocks: 1 exact, 2, 4 or 8 keys to a mean, 0 skip.

    Args:
      query, key, offsets, as_published, scale: those of `attention`.
      query_block_size, key_block_size: at least 4; a multiple of 8, at least tile_size.
      rule: whether bounds are shares of a row's blocks ("rank") or of its scores ("energy").
      bounds: where levels 1, 2, 4 and 8 end in the ranking, as shares.
      similarity_thresholds: least mean cosine of keys 1, 3 and 7 apart in a block of level 2, 4, 8. None: no cap.
      text_length: tokens at the end whose key blocks have level 1.
      tile_size: keys or means that the authors' kernel reads at once; bands hold whole tiles.
      least_exact_share: by "energy", level 1 has more than this share of a row's blocks.
    """
    scale = check_attention(query, key, key, scale)
    check_self_attention(query, key)
    check_not_negative("text_length", text_length)
    if query_block_size < 4:
        raise ValueError(f"query_block_size must be at least 4, got {query_block_size=}")
    check_positive("tile_size", tile_size)
    if key_block_size < tile_size or key_block_size % 8:
        raise ValueError(f"key_block_size must be a multiple of 8 and at least {tile_size=}, got {key_block_size=}")
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule=}")
    if len(bounds) != 4 or list(bounds) != sorted(bounds) or bounds[0] < 0 or bounds[3] > 1:
        raise ValueError(f"bounds must be four numbers from 0 to 1 in rising order, got {bounds=}")
    sizes = query_block_size, key_block_size
    for array, places, size in zip((query, key), offsets, sizes, strict=True):
        check_integers("offsets", places, (array.shape[0], array.shape[2], size // 4))
    query, key = jax.lax.stop_gradient((query, key))
    query, keys = (describe.sample_blocks(*side) for side in zip((query, key), offsets, sizes, strict=True))
    scores = score.peaks(query, keys, query_block_size=sizes[0] // 4, key_block_size=sizes[1] // 4, scale=scale)
    tiles = tuple(-(-level // (key_block_size // tile_size)) for level in _LEVELS)  # blocks that fill one
    least = 0 if rule == "rank" else int(least_exact_share * scores.shape[-1]) + 1
    band = choose.bands(scores, bounds, rule=rule, multiples=tiles, least_first=least)
    levels = jnp.array((*_LEVELS, 0), jnp.int8)[band]
    if text_length:
        has_text = jnp.arange(scores.shape[-1]) >= (key.shape[1] - text_length) // key_block_size
        levels = jnp.where(has_text[None, None, None], 1, levels)
    if similarity_thresholds is not None:
        key = describe.fill_blocks(key, key_block_size) if as_published else key
        cap = describe.poolable(key, key_block_size, similarity_thresholds).swapaxes(1, 2)[:, :, None]
        levels = jnp.minimum(levels, cap.repeat(query.shape[2] // key.shape[2], axis=1).astype(jnp.int8))
    return LevelMap(levels, query_block_size, key_block_size)


@splits_over_mesh(offsets=("bh", "bk"))
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    offsets: Offsets,
    *,
    tile_size: int = 32,
    as_published: bool = False,
    is_older_kernel: bool = False,
    scale: float | None = None,
    **options: Any,
) -> jax.Array:
    """One softmax over the keys of level 1 and the means of h keys of level h, with log h added to their logits.

    An array of query's shape and dtype; no gradient flows through the choice.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key, value: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      offsets: what `draw_offsets` gives.
      tile_size: keys or means in a tile.
      as_published: with the authors' errors (module docstring).
      is_older_kernel: with those of their older kernel, which fills no tiles.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      options: the others of `select`.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(query, key, offsets, tile_size=tile_size, as_published=as_published, scale=scale, **options)
    partials = [attend_tiles(query, key, value, levels, make_visibility(query, key, is_causal=False), scale=scale)]
    if as_published:
        key, value = (describe.fill_blocks(array, levels.key_block_size) for array in (key, value))
    for level in _LEVELS[1:]:
        partials.append(rest.means(query, key, value, levels, level=level, scale=scale))
        if as_published and not is_older_kernel and 2 * levels.key_block_size < level * tile_size:
            partials.append(_strays(query, key, value, levels, level, tile_size, scale))
    return merge(*partials).output().astype(query.dtype)


def _strays(
    query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap, level: int, tile_size: int, scale: float
) -> Partial:
    """What the authors read besides two blocks of a level that do not fill a tile: the row's means at its places."""
    strays = slice(2 * levels.key_block_size, level * tile_size)
    key, value = (describe.block_mean(array[:, strays], level) for array in (key, value))
    pairs = (levels.levels == level).sum(-1, keepdims=True) // 2  # [batch, heads, query_blocks, 1]
    is_used = jnp.broadcast_to(pairs > 0, (*pairs.shape[:3], key.shape[1]))
    log_count, size = jnp.full((1, 1), math.log(level)), levels.query_block_size
    part = rest.pooled(query, key, value, log_count, is_used, query_block_size=size, scale=scale)
    times = pairs.repeat(size, axis=2)[:, :, : query.shape[1]].swapaxes(1, 2)  # [batch, queries, heads, 1]
    return Partial(part.maximum, times[..., 0] * part.total, times * part.accumulator)
