"""SALE: all logits are estimated in 4 bits; a tile counts if one of them weighs enough beside what is attended anyway.

Paper: SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (arXiv 2505.24179).
Training-free, for causal prefill of whole prompts. Always attended: the first key block and the last `local_window`
keys up to the end of the query block; L_t is the log-sum-exp of their logits for query t. Queries and keys lose their
mean over the prompt and are rounded, each token with a step of its own (`quantise`), to n_t and n_s:

    x_ts = scale (step_t step_s (n_t n_s) + mean q (k_s - mean k)),      n_t n_s exact, in integers

estimates the logit, exp(x_ts - L_t) is the Relative Attention Score (the authors write exp(x - m) / l with softmax's
running maximum and sum). A tile is attended exactly if any of its scores is above the head's threshold.

Defaults: tiles of 64 queries and 32 keys, local_window 128, dense up to 1024 tokens, error of `calibrate` 0.4;
threshold 0.004 is the example in the authors' readme.

Where code and paper disagree, and what of the code (BirdChristopher/SALE at ec20815) is not here. Smoothing queries
too is the code's. Its quant_mode 2 has steps per token; mode 3 shares them between the tokens that one GPU thread
holds. Its two-pass mode fixes L_t before tiles are judged, as here; in the other L_t grows with the tiles. It extends
the local window by up to 3 key blocks, for whole segments, and keeps steps in 16 bits; here they are float32. Its
kernels need a GPU with 4-bit tensor cores: no outputs of theirs were at hand to compare with.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_not_negative, check_positive, check_self_attention
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility, visible_blocks

RECIPE = Recipe(
    name="SALE",
    paper="2505.24179",
    blocks="64 / 32",
    describe="4-bit integers of centred tokens",
    score="largest estimated weight of the tile, relative to the mass of the forced part",
    choose="per query block and head: above a calibrated threshold; first block and 128 last keys forced",
    when="prefill, above 1024 tokens",
)


def quantise(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """n = round(7 x / max_d |x|), half to even, int8 `[..., head_dim]`; its step max_d |x| / 7, float32 `[...]`."""
    largest = jnp.abs(array).max(-1)
    return jnp.round(7 * array / jnp.where(largest > 0, largest, 1)[..., None]).astype(jnp.int8), largest / 7


def score_blocks(query: jax.Array, key: jax.Array, forced: LevelMap, *, scale: float) -> jax.Array:
    """log of the largest Relative Attention Score, max (x_ts - L_t), of every tile, causality aside.

    float32 `[batch, heads, query_blocks, key_blocks]`; holds the estimates of one query block at a time. The map forced
    has level 1 where a tile is attended anyway. Args: those of `attention`.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    kv_heads, query_block_size, key_block_size = key.shape[2], forced.query_block_size, forced.key_block_size
    query, key = (array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in (query, key))
    mean = query.mean(1).reshape(batch, kv_heads, -1, head_dim)
    smooth = key - key.mean(1, keepdims=True)
    visibility = make_visibility(query, key, is_causal=True)
    reference = attend_tiles(query, smooth, smooth, forced, visibility, scale=scale).log_sum_exp()  # L_t
    fill = ((0, 0), (0, -num_tokens % query_block_size), (0, 0))
    reference = jnp.pad(reference, fill, constant_values=jnp.inf)  # [batch, tokens, heads]: no token, no score
    smooth = jnp.pad(smooth, ((0, 0), (0, -num_tokens % key_block_size), (0, 0), (0, 0)))
    key_numbers, key_step = quantise(smooth)
    of_mean = jnp.einsum("bkgd,bskd->bkgs", mean, smooth, precision="highest")[:, :, :, None]
    key_step = key_step.swapaxes(1, 2)[:, :, None, None]  # [batch, kv_heads, 1, 1, keys]

    def score_block(block: tuple[jax.Array, ...]) -> jax.Array:
        numbers, step, reference = (array.reshape(*array.shape[:2], kv_heads, -1, *array.shape[3:]) for array in block)
        step, reference = (jnp.moveaxis(array, 1, 3)[..., None] for array in (step, reference))  # [b, k, g, t, 1]
        product = jnp.einsum("btkgd,bskd->bkgts", numbers, key_numbers, preferred_element_type=jnp.int32)
        excess = scale * (step * key_step * product + of_mean) - reference
        return excess.reshape(batch, num_heads, query_block_size, -1, key_block_size).max((2, 4))

    centred = query - query.mean(1, keepdims=True)
    blocks = (split_blocks(array, query_block_size).swapaxes(0, 1) for array in (*quantise(centred), reference))
    return jnp.moveaxis(jax.lax.map(score_block, tuple(blocks)), 0, 2)


@splits_over_mesh("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    threshold: float | jax.Array = 0.004,
    local_window: int = 128,
    dense_length: int = 1024,
    query_block_size: int = 64,
    key_block_size: int = 32,
    scale: float | None = None,
) -> LevelMap:
    """The tiles that are attended, levels 0 and 1. Args: those of `attention`."""
    scale = check_attention(query, key, key, scale)
    check_self_attention(query, key)
    check_positive("query_block_size", query_block_size)
    check_positive("key_block_size", key_block_size)
    check_not_negative("dense_length", dense_length)
    if local_window < query_block_size:
        raise ValueError(f"local_window must hold a query block, {query_block_size=}, got {local_window=}")
    limit = jnp.asarray(threshold, jnp.float32)
    if limit.shape not in ((), query.shape[2:3]) or (isinstance(threshold, float | int) and not threshold >= 0):
        raise ValueError(f"threshold must be a number of at least 0, or [{query.shape[2]}] of them, got {threshold=}")
    query, key = jax.lax.stop_gradient((query, key))
    batch, num_tokens, num_heads, _ = query.shape
    visible = visible_blocks(make_visibility(query, key, is_causal=True), query_block_size, key_block_size)
    visible = jnp.broadcast_to(visible, (batch, num_heads, *visible.shape[2:]))
    if num_tokens <= dense_length:
        return LevelMap(visible.astype(jnp.int8), query_block_size, key_block_size)
    start = query_block_size * (jnp.arange(visible.shape[2]) + 1)[:, None] - local_window  # of the local window
    end = key_block_size * (jnp.arange(visible.shape[3]) + 1)[None, :]
    forced = visible & ((end > start) | (end == key_block_size))[None, None]
    forced_levels = LevelMap(forced.astype(jnp.int8), query_block_size, key_block_size)
    is_above = score_blocks(query, key, forced_levels, scale=scale) > jnp.log(limit).reshape(1, -1, 1, 1)
    return LevelMap((visible & (forced | is_above)).astype(jnp.int8), query_block_size, key_block_size)


@splits_over_mesh()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    threshold: float | jax.Array = 0.004,
    local_window: int = 128,
    dense_length: int = 1024,
    query_block_size: int = 64,
    key_block_size: int = 32,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, over the tiles that `select` keeps.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      threshold: least Relative Attention Score, one number or `[heads]`, not negative; 0 keeps everything.
      local_window: keys up to the end of a query block that are always attended, at least a query block.
      dense_length: prompts of at most that many tokens attend everything.
      query_block_size, key_block_size: tokens in a block; the last may be shorter.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype. A ValueError names a wrong argument.
    """
    scale = check_attention(query, key, value, scale)
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    reach = {"local_window": local_window, "dense_length": dense_length}
    levels = select(query, key, threshold=threshold, **reach, **sizes, scale=scale)
    visibility = make_visibility(query, key, is_causal=True)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)


def calibrate(query: jax.Array, key: jax.Array, value: jax.Array, *, error: float = 0.4, **options: int) -> jax.Array:
    """One layer's thresholds, float32 `[heads]`, from examples of one length, the rows of query, key and value.

    Each starts at 0.008 and halves until the L1 error of the head's output, averaged over tokens, is below `error` in
    every example; at 1e-4 it becomes 0, which is dense. Args: those of `attention`.
    """
    exact = attention(query, key, value, threshold=0.0, **options)

    def halve(_: int, threshold: jax.Array) -> jax.Array:
        output = attention(query, key, value, threshold=threshold, **options)
        distance = jnp.abs(output.astype(jnp.float32) - exact.astype(jnp.float32)).sum(-1)  # [batch, tokens, heads]
        half = jnp.where(threshold / 2 > 1e-4, threshold / 2, 0)
        return jnp.where((distance.mean(1) < error).all(0), threshold, half)

    return jax.lax.fori_loop(0, 7, halve, jnp.full(query.shape[2], 0.008))
