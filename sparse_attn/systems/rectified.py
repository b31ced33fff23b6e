"""Rectified SpaAttn: exact attention to some blocks, scaled to its share of the mass; pooled attention where it helps.

Paper: Rectified SpaAttn (arXiv 2511.19835). Training-free, for video diffusion; not causal. Means of query and key
blocks give a pooled attention P; text keys are not pooled, and a video block counts as often as it has tokens. Attended
exactly: the blocks of the largest P up to a mass, a number of them at least, forced ones, all text. Of the others those
are *compensated* whose gain |mean q . mean k| is above an estimate of what pooling errs, |mean|dq| . mean k| +
|mean q . mean|dk||, with dq, dk the differences from the mean. With O_s the exact softmax and R the mass of all that is
not compensated, O = R O_s + sum over compensated blocks of P mean(v). Text queries attend everything.

Defaults: those of the authors' scripts for Wan2.1: blocks of 128, mass 0.3, a quarter of the blocks at least (a fifth
for Hunyuan, a tenth for Flux). Video tokens come along `order.space_filling_curve`, text behind them: hidden states may
be permuted once for all layers. Forced are its `order.neighbouring_blocks` and, for Wan, the first frame among itself.

Where code and paper disagree, the authors' code (BienLuky/Rectified-SpaAttn at 4b0aa10) is followed: text is one more
entry of the ranking. Corrected, with `as_published` for their numbers: means and weight of a short last block run over
the tokens it has (theirs: zeros behind it count as tokens). Theirs is for batches of one and whole blocks before text.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import block_lengths, block_mean, block_spread, fill_blocks
from sparse_attn.merge import Partial, merge
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="Rectified SpaAttn",
    paper="2511.19835",
    order="space-filling curve",
    blocks="128 / 128",
    describe="mean; text keys as they are",
    score="softmax of means, blocks weighted by their size",
    choose="per query block and head: top-p and top-k; neighbours, first frame and text forced",
    rest="pooled probability x mean value where its gain is above its error",
    merge="R x exact + rest",
    when="dense in the first 10 denoising steps and 2 layers",
)


def weigh(
    query: jax.Array, key: jax.Array, *, block_size: int, text_length: int, as_published: bool, scale: float
) -> tuple[jax.Array, jax.Array]:
    """P, float32 `[batch, heads, query_blocks, key_blocks + 1]`, the last column all text, and where it gains, bool."""
    num_video = key.shape[1] - text_length
    query, key, text_key = query[:, :num_video], key[:, :num_video], key[:, num_video:]
    if as_published:
        query, key = (fill_blocks(array, block_size, "constant") for array in (query, key))
    query_mean, key_mean = block_mean(query, block_size), block_mean(key, block_size)
    scores, text_scores = score.dot(query_mean, key_mean), score.dot(query_mean, text_key)
    query_error = score.dot(block_spread(query, block_size), key_mean)
    key_error = score.dot(query_mean, block_spread(key, block_size))
    log_count = jnp.log(block_lengths(key.shape[1], block_size))[None, None, None]
    probability = score.softmax(jnp.concatenate([scale * scores + log_count, scale * text_scores], axis=-1))
    video, text = jnp.split(probability, [scores.shape[-1]], axis=-1)
    has_gain = jnp.abs(scores) > jnp.abs(query_error) + jnp.abs(key_error)
    return jnp.concatenate([video, text.sum(-1, keepdims=True)], axis=-1), has_gain


@splits_over_mesh("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int = 128,
    threshold: float = 0.3,
    top_k: int | None = None,
    forced: jax.Array | None = None,
    text_length: int = 0,
    as_published: bool = False,
    scale: float | None = None,
) -> LevelMap:
    """What the video's query blocks do with its key blocks: 1 attend exactly, 2 compensate, 0 neither.

    Args:
      query, key, block_size, text_length, as_published, scale: those of `attention`.
      threshold: share of P that the kept blocks reach, between 0 and 1.
      top_k: blocks that are kept at least. None: a quarter.
      forced: None, or bool `[blocks, blocks]`, pairs that are kept besides: neighbours, the first frame among itself.
    """
    scale = check_attention(query, key, key, scale)
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    if not 0 <= text_length < key.shape[1]:
        raise ValueError(f"text_length must be from 0 to below the {key.shape[1]} tokens, got {text_length=}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold=}")
    query, key = jax.lax.stop_gradient((query, key))
    probability, has_gain = weigh(
        query, key, block_size=block_size, text_length=text_length, as_published=as_published, scale=scale
    )
    top_k = max(1, has_gain.shape[3] // 4) if top_k is None else top_k
    check_positive("top_k", top_k)
    kept = (choose.top_p(probability, threshold) | choose.top_k(probability, top_k))[..., :-1]
    if forced is not None:
        if forced.shape != kept.shape[2:] or forced.dtype != bool:
            raise ValueError(f"forced must be bool {kept.shape[2:]}, got {forced.dtype} of shape {forced.shape}")
        kept |= jnp.asarray(forced)[None, None]
    return LevelMap(jnp.where(kept, 1, jnp.where(has_gain, 2, 0)).astype(jnp.int8), block_size, block_size)


def rectify(probability: jax.Array, levels: LevelMap, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R `[batch, query_blocks, heads, 1]` and the compensation `[batch, query_blocks, heads, head_dim]`, float32."""
    weight, mean = jnp.where(levels.levels == 2, probability[..., :-1], 0), block_mean(value, levels.key_block_size)
    grouped = weight.reshape(weight.shape[0], value.shape[2], -1, *weight.shape[2:])
    compensation = jnp.einsum("bkgij,bjkd->bikgd", grouped, mean, precision="highest")
    factor = (probability.sum(-1) - weight.sum(-1)).swapaxes(1, 2)
    return factor[..., None], compensation.reshape(*factor.shape, -1)


@splits_over_mesh()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int = 128,
    text_length: int = 0,
    as_published: bool = False,
    scale: float | None = None,
    **options: Any,
) -> jax.Array:
    """R O_s + sum over compensated blocks of P mean(v) for the video, full attention for text queries: like query.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key, value: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      block_size, text_length: tokens in a block, the last may be shorter; tokens of text, behind the video.
      as_published: with the authors' means of a short last block (module docstring).
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      options: the others of `select`.
    """
    scale = check_attention(query, key, value, scale)
    shared: dict[str, Any] = {"block_size": block_size, "text_length": text_length, "as_published": as_published}
    levels = select(query, key, scale=scale, **shared, **options)
    probability, _ = weigh(query, key, scale=scale, **shared)
    num_video = query.shape[1] - text_length
    video_query, video_key, video_value = (array[:, :num_video] for array in (query, key, value))
    visibility = make_visibility(video_query, video_key, is_causal=False)
    exact = attend_tiles(video_query, video_key, video_value, levels, visibility, scale=scale)
    if text_length:
        exact = merge(exact, _attend_all(video_query, key[:, num_video:], value[:, num_video:], block_size, scale))
    video_value = fill_blocks(video_value, block_size, "constant") if as_published else video_value
    corrections = rectify(probability, levels, video_value)
    factor, compensation = (array.repeat(block_size, axis=1)[:, :num_video] for array in corrections)
    output = factor * exact.output() + compensation
    if text_length:
        output = jnp.concatenate([output, _attend_all(query[:, num_video:], key, value, block_size, scale).output()], 1)
    return output.astype(query.dtype)


def _attend_all(query: jax.Array, key: jax.Array, value: jax.Array, block_size: int, scale: float) -> Partial:
    blocks = (-(-array.shape[1] // block_size) for array in (query, key))
    levels = LevelMap(jnp.ones((query.shape[0], query.shape[2], *blocks), jnp.int8), block_size, block_size)
    return attend_tiles(query, key, value, levels, make_visibility(query, key, is_causal=False), scale=scale)
