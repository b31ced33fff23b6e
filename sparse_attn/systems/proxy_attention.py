"""ProxyAttn: one proxy head ranks the blocks for a whole group of heads; every head has a budget of its own.

Paper: ProxyAttn: Guided Sparse Attention via Representative Heads (arXiv 2509.24745). Training-free causal prefill. The
heads of a group, whole groups of key/value heads, are averaged into one proxy query and key; one token in `stride` is
kept. Softmax of the proxy's logits, then the largest weight in every pair of blocks, ranks the key blocks of a query
block. How many blocks head h keeps is found once: the real attention of its last query block, pooled to key blocks,
says how many of them hold the mass `mass`; every query block keeps as many, and at least `min_tokens`.

Defaults: one proxy head (four for Qwen2.5-7B-1M), stride 4, mass 0.95, at least 2048 tokens, blocks of 128.

Where code and paper disagree: unknown. Neither the code nor the paper itself was at hand, only notes and reviews of it.
Decided here: a query block that sees fewer blocks than its budget attends all of them, the diagonal is always attended
and counts, strides count from the start of the row, and the block size.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="ProxyAttn",
    paper="2509.24745",
    blocks="128 / 128",
    describe="mean over the heads of a group, one token in 4",
    score="softmax, largest weight in a pair of blocks",
    choose="rank by group, number of blocks by head from the last query block; diagonal forced and counted",
    when="prefill",
)


def proxy_scores(
    query: jax.Array, key: jax.Array, *, num_proxies: int, stride: int, block_size: int, scale: float
) -> jax.Array:
    """Largest softmax weight of a proxy head in every pair of blocks: float32 `[batch, proxies, blocks, blocks]`.

    One query block's weights are alive at once. Args: those of `attention`.
    """
    batch, num_tokens, _, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def proxy(array: jax.Array) -> jax.Array:  # [batch, blocks, kept tokens of a block, proxies, head_dim]
        array = array.astype(dtype).reshape(batch, num_tokens, num_proxies, -1, head_dim).mean(3)
        return split_blocks(array, block_size)[:, :, ::stride]

    query, key = proxy(query), proxy(key)
    place = jnp.arange(query.shape[1] * block_size).reshape(-1, block_size)[:, ::stride]  # [blocks, kept tokens]

    def score_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, row = block  # [batch, kept tokens, proxies, head_dim], [kept tokens]
        # Axes: p proxies, t kept queries, j key blocks, m kept keys of a block.
        logits = scale * jnp.einsum("btpd,bjmpd->bptjm", query, key, precision="highest")
        is_seen = (place <= row[:, None, None]) & (row < num_tokens)[:, None, None]
        weights = score.softmax(logits.reshape(*logits.shape[:3], -1), is_seen.reshape(row.size, -1))
        return weights.reshape(logits.shape).max((2, 4))  # [batch, proxies, key_blocks]

    return jnp.moveaxis(jax.lax.map(score_block, (query.swapaxes(0, 1), place)), 0, 2)


def count_blocks(query: jax.Array, key: jax.Array, *, mass: float, block_size: int, scale: float) -> jax.Array:
    """Fewest key blocks that hold the share `mass` of the last block_size queries' attention: int32 `[batch, heads]`.

    Args: those of `attention`.
    """
    last = query[:, -block_size:]
    visibility = make_visibility(last, key, is_causal=True)
    is_seen = visibility.position[:, None, None, :, 0] < visibility.stop[:, None, :, None]
    weights = score.softmax(scale * score.dot(last, key), is_seen).sum(2)  # [batch, heads, keys]
    pooled = split_blocks(weights.swapaxes(1, 2), block_size).sum(2)  # [batch, blocks, heads]
    return choose.top_p(pooled.swapaxes(1, 2), mass).sum(-1, dtype=jnp.int32)


@splits_over_mesh("bh", whole="h")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    num_proxies: int = 1,
    stride: int = 4,
    mass: float = 0.95,
    min_tokens: int = 2048,
    block_size: int = 128,
    scale: float | None = None,
) -> LevelMap:
    """Which key blocks each query block attends. Args: those of `attention`."""
    check_self_attention(query, key)
    for name, number in (("num_proxies", num_proxies), ("stride", stride), ("block_size", block_size)):
        check_positive(name, number)
    num_heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads % num_proxies:
        raise ValueError(f"num_proxies must divide the {kv_heads} heads of key, got num_proxies={num_proxies}")
    if block_size % stride:
        raise ValueError(f"stride must divide block_size={block_size}, got stride={stride}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = jax.lax.stop_gradient((query, key))
    scores = proxy_scores(query, key, num_proxies=num_proxies, stride=stride, block_size=block_size, scale=scale)
    block = jnp.arange(scores.shape[-1])
    scores = jnp.where(block[None, :] <= block[:, None], scores, -jnp.inf)
    scores = jnp.where(block[None, :] == block[:, None], jnp.inf, scores)
    budget = count_blocks(query, key, mass=mass, block_size=block_size, scale=scale)
    budget = jnp.maximum(budget, -(-min_tokens // block_size))[:, :, None, None]
    chosen = choose.top_k(scores.repeat(num_heads // num_proxies, axis=1), budget)
    return LevelMap(chosen.astype(jnp.int8), block_size, block_size)


@splits_over_mesh(whole="h")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_proxies: int = 1,
    stride: int = 4,
    mass: float = 0.95,
    min_tokens: int = 2048,
    block_size: int = 128,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, of every query block over its chosen key blocks.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      num_proxies: groups of heads that share a ranking, a divisor of kv_heads.
      stride: the proxy sees one token in so many, a divisor of block_size.
      mass: share of the last query block's attention that a head's budget of blocks must hold, between 0 and 1.
      min_tokens: smallest budget, in tokens.
      block_size: tokens in a block; the last may be shorter.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(
        query,
        key,
        num_proxies=num_proxies,
        stride=stride,
        mass=mass,
        min_tokens=min_tokens,
        block_size=block_size,
        scale=scale,
    )
    visibility = make_visibility(query, key, is_causal=True)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
