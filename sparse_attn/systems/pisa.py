"""PISA: the best blocks exactly, all others by their mean key, their values and one correction of first order.

Paper: PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers (arXiv 2602.01077). Training-free,
not causal. Query blocks score key blocks by the dot product of their means; the best share (`density`) is attended
exactly. Around its mean k_j, the attention of another block of n_j keys is expanded: n_j exp(scale q k_j) joins the
normaliser, exp(scale q k_j) sum(v) the sum of values, and the first-order term scale q H_j exp(scale q k_j), where
H_j = sum (k - k_j)^T v, is averaged over the row: scale q (sum_j H_j / tokens) times the whole mass of the tail.

Defaults: blocks of 64, density 0.1 in the authors' function (0.15 in their readme; 0.125 for video). Tokens come in an
order in which blocks are patches: 8 x 8 tiles for images, `order.boxes((1, height, width), (8, 8))`.

Where code and paper disagree, the authors' code (xie-lab-ml/piecewise-sparse-attention at 8604494) is followed:
`use_moment_norm`, for images, ranks by the norm of H_j (paper: of its distance from the mean H); the average of the
H_j runs over all blocks, the exact ones too. Corrected: their kernel reads the pooled keys in groups and does not
rescale the tail's mass when a later group raises the running maximum; `tail_group_size` gives the published numbers.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, rest, score
from sparse_attn.grammar.describe import block_lengths, block_mean, split_blocks
from sparse_attn.merge import merge
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="PISA",
    paper="2602.01077",
    order="8 x 8 tiles (images)",
    blocks="64 / 64",
    describe="mean query; mean key, sum of values, first moment",
    score="dot of means (images: softmax, plus the log of the moment's norm)",
    choose="per query block and head: top-k share",
    rest="pooled key and value of every other block; first order with one moment for the head",
    when="dense in the first 10 to 15 denoising steps and the first layer",
)


def describe(key: jax.Array, value: jax.Array, *, block_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What blocks are known by, float32: mean keys and values `[batch, key_blocks, kv_heads, head_dim]`, and first
    moments H_j, `[batch, key_blocks, kv_heads, head_dim, head_dim]`. Args: those of `attention`.
    """
    key_mean, value_mean = block_mean(key, block_size), block_mean(value, block_size)
    centred = split_blocks(key.astype(key_mean.dtype), block_size) - key_mean[:, :, None]
    values = split_blocks(value.astype(key_mean.dtype), block_size)  # zero behind the last token
    # Axes: j blocks, s keys of a block, k key/value heads, d and e features.
    return key_mean, value_mean, jnp.einsum("bjskd,bjske->bjkde", centred, values, precision="highest")


def score_blocks(
    query: jax.Array, key_mean: jax.Array, moments: jax.Array, *, block_size: int, scale: float, use_moment_norm: bool
) -> jax.Array:
    """scale mean(q) k_j; with `use_moment_norm` the softmax over j of that plus log(norm(H_j) + 1e-5), Frobenius norm.

    float32 `[batch, heads, query_blocks, key_blocks]`. Args: those of `attention`, and what `describe` gives.
    """
    scores = scale * score.dot(block_mean(query, block_size), key_mean)
    if not use_moment_norm:
        return scores
    norm = jnp.sqrt(jnp.square(moments).sum((-2, -1))).swapaxes(1, 2)  # [batch, kv_heads, key_blocks]
    bias = jnp.log(norm + 1e-5).repeat(query.shape[2] // norm.shape[1], axis=1)
    return score.softmax(scores + bias[:, :, None])


@splits_over_mesh("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    density: float = 0.1,
    block_size: int = 64,
    use_moment_norm: bool = False,
    scale: float | None = None,
) -> LevelMap:
    """The int(density key_blocks) best key blocks of every query block, one at least: 1 attend exactly, 0 the tail.

    Args: those of `attention`.
    """
    scale = check_attention(query, key, value, scale)
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    if not 0 <= density <= 1:
        raise ValueError(f"density must be between 0 and 1, got density={density!r}")
    query, key, value = jax.lax.stop_gradient((query, key, value))
    key_mean, _, moments = describe(key, value, block_size=block_size)
    scores = score_blocks(query, key_mean, moments, block_size=block_size, scale=scale, use_moment_norm=use_moment_norm)
    chosen = choose.top_k(scores, max(1, int(density * scores.shape[-1])))
    return LevelMap(chosen.astype(jnp.int8), block_size, block_size)


@splits_over_mesh()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    density: float = 0.1,
    block_size: int = 64,
    use_moment_norm: bool = False,
    tail_group_size: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Exact attention to the chosen blocks and a piecewise expansion of all others, in one normaliser.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      density: share of the key blocks that is attended exactly, between 0 and 1.
      block_size: tokens in a block; the last may be shorter.
      use_moment_norm: rank by the norm of the first moments too.
      tail_group_size: None, or that many pooled keys to a group for the published error (module docstring).
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    if tail_group_size is not None:
        check_positive("tail_group_size", tail_group_size)
    levels = select(
        query, key, value, density=density, block_size=block_size, use_moment_norm=use_moment_norm, scale=scale
    )
    key_mean, value_mean, moments = describe(key, value, block_size=block_size)
    exact = attend_tiles(query, key, value, levels, make_visibility(query, key, is_causal=False), scale=scale)
    log_count, is_tail = jnp.log(block_lengths(key.shape[1], block_size))[None], levels.levels == 0
    tail = rest.pooled(query, key_mean, value_mean, log_count, is_tail, query_block_size=block_size, scale=scale)
    if tail_group_size is not None:
        tail = tail._replace(total=_unrescaled_mass(query, key, key_mean, levels, tail.maximum, tail_group_size, scale))
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3]).astype(moments.dtype)
    slope = jnp.einsum("btkgd,bkde->btkge", grouped, moments.sum(1), precision="highest").reshape(query.shape)
    first_order = (scale / key.shape[1]) * tail.total[..., None] * slope
    tail = tail._replace(accumulator=tail.accumulator + first_order)
    return merge(exact, tail).output().astype(query.dtype)


def _unrescaled_mass(
    query: jax.Array, key: jax.Array, key_mean: jax.Array, levels: LevelMap, maximum: jax.Array, size: int, scale: float
) -> jax.Array:
    """The tail's mass as published, for `maximum`: groups of `size` by the running maximum they met."""
    block_size, visibility = levels.key_block_size, make_visibility(query, key, is_causal=False)
    largest = score.exact_blocks(query, key, visibility, query_block_size=1, key_block_size=block_size, scale=scale)
    is_exact = levels.to_mask().repeat(block_size, axis=2)[:, :, : query.shape[1]]
    running = jnp.where(is_exact, largest, -jnp.inf).max(-1).swapaxes(1, 2)  # [batch, queries, heads]
    count = jnp.broadcast_to(block_lengths(key.shape[1], block_size)[None, :, None, None], key_mean.shape)
    mass = jnp.zeros_like(running)
    for start in range(0, key_mean.shape[1], size):
        is_in_group = jnp.arange(key_mean.shape[1]) // size == start // size
        used = (levels.levels == 0) & is_in_group[None, None, None]
        part = rest.pooled(query, key_mean, count, jnp.zeros((1, 1)), used, query_block_size=block_size, scale=scale)
        running = jnp.maximum(running, part.maximum)
        mass += jnp.exp(part.maximum - running) * part.accumulator[..., 0]
    return jnp.where(mass > 0, mass * jnp.exp(running - maximum), 0)
