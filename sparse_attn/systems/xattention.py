"""XAttention: antidiagonals of the logits tell how much attention a pair of blocks holds.

Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428). Training-free prefill. Logits
are averaged along the antidiagonal of every tile of stride x stride tokens. Softmax over the tiles of a row, then the
sum inside each pair of blocks. Every query block takes the shortest prefix of key blocks by falling score whose mass
reaches `threshold`; the first block and the diagonal stand in front of all others, and their mass counts.

Defaults: blocks of 128, stride 8 (or 16), threshold 0.9; the threshold may differ by head (the paper searches one for
each layer and head).

Where code and paper disagree. The abstract speaks of sums of attention values; both compute means of logits before the
softmax, which is followed. In the authors' code (mit-han-lab/x-attention at e379887), the chunk of queries that starts
at the first block - all of them, up to 16K tokens - credits the diagonal alone and keeps one block more than the
shortest prefix, and column 0 is chosen even without causality: `chunk_size` gives that choice, None the described one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_arrays, check_attention, check_positive, check_whole_blocks
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility, visible_blocks

RECIPE = Recipe(
    name="XAttention",
    paper="2503.16428",
    blocks="128 / 128",
    describe="strides of tokens, queries in reverse order",
    score="softmax of the mean logit of antidiagonals, summed in a pair of blocks",
    choose="per query block and head: share of the mass; first block and diagonal forced and credited",
    when="prefill; video: dense in the first 5 steps",
)


def score_blocks(
    query: jax.Array, key: jax.Array, *, stride: int, block_size: int, is_causal: bool, scale: float
) -> jax.Array:
    """Softmax weights of the tiles of stride x stride tokens, summed in every pair of blocks.

    Tile (r, c) has the logit scale / stride * sum_j q[r stride + stride - 1 - j] . k[c stride + j]; causal, tile row r
    sees the tile columns up to its own. Rows behind the last query are zero; one query block's tiles are alive at once.

    Args: those of `attention`.

    Returns:
      float32 `[batch, heads, query_blocks, key_blocks]`; a row sums to the tile rows that its queries fill.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    tiles = block_size // stride  # of a block
    query = split_blocks(query.astype(dtype), block_size)
    query = query.reshape(batch, -1, tiles, stride, kv_heads, num_heads // kv_heads, head_dim)
    key = split_blocks(key.astype(dtype), block_size).reshape(batch, -1, stride, kv_heads, head_dim)[:, :, ::-1]
    query_blocks, key_blocks = query.shape[1], key.shape[1] // tiles
    column = jnp.arange(key.shape[1])[None, :]

    def score_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, first = block  # [batch, tiles, stride, kv_heads, group, head_dim], first tile row
        # Axes: t tile rows, c tile columns, n tokens of a tile.
        logits = jnp.einsum("btnkgd,bcnkd->bkgtc", query, key, precision="highest") * (scale / stride)
        row = first + jnp.arange(tiles)[:, None]
        is_seen = (column * stride < num_keys) & (row * stride < num_queries)
        if is_causal:
            is_seen &= column <= row + (key_blocks - query_blocks) * tiles
        weights = score.softmax(logits, is_seen[None, None, None])
        return weights.reshape(batch, num_heads, tiles, key_blocks, tiles).sum((2, 4))

    first = jnp.arange(query_blocks) * tiles
    return jnp.moveaxis(jax.lax.map(score_block, (query.swapaxes(0, 1), first)), 0, 2)


def _whole(arguments: dict[str, Any]) -> str:
    """Heads stay together where each has its own threshold."""
    return "h" if isinstance(arguments.get("threshold"), tuple) else ""


@splits_over_mesh("bh", whole=_whole)
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    threshold: float | tuple[float, ...] = 0.9,
    stride: int = 8,
    block_size: int = 128,
    is_causal: bool = True,
    chunk_size: int | None = None,
    scale: float | None = None,
) -> LevelMap:
    """Which key blocks each query block attends. Args: those of `attention`."""
    check_arrays(query, {"key": key})
    check_positive("stride", stride)
    check_positive("block_size", block_size)
    if block_size % stride:
        raise ValueError(f"stride must divide block_size={block_size}, got stride={stride}")
    if is_causal:
        check_whole_blocks(query, key, block_size)
    if isinstance(threshold, tuple) and len(threshold) != query.shape[2]:
        raise ValueError(f"threshold must be a number or one for each of {query.shape[2]} heads, got {threshold=}")
    share = jnp.asarray(threshold, jnp.float32).reshape(-1, 1, 1)  # [heads or 1, 1, 1]
    query, key = jax.lax.stop_gradient((query, key))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mass = score_blocks(query, key, stride=stride, block_size=block_size, is_causal=is_causal, scale=scale)
    row, column = jnp.arange(mass.shape[-2])[:, None], jnp.arange(mass.shape[-1])[None]
    row += mass.shape[-1] - mass.shape[-2]  # where the diagonal is
    if is_causal:
        chosen = choose.top_p(mass, share, (column == 0) | (column == row))
    else:
        chosen = choose.top_p(mass, share) | ((column == 0) if chunk_size is not None else False)
    if is_causal and chunk_size is not None:
        check_positive("chunk_size", chunk_size)
        is_first = row < (chunk_size // block_size if mass.shape[-1] == mass.shape[-2] else 0)
        chosen = jnp.where(is_first, _lagging_top_p(mass, share, column == row) | (column == 0), chosen)
    chosen &= visible_blocks(make_visibility(query, key, is_causal=is_causal), block_size, block_size)
    return LevelMap(chosen.astype(jnp.int8), block_size, block_size)


def _lagging_top_p(mass: jax.Array, share: jax.Array, first: jax.Array) -> jax.Array:
    """`choose.top_p` with a sum that forgets the last block taken, so that one more is."""
    others = jnp.where(first, 0.0, mass)
    sorted_mass = jnp.sort(others, axis=-1, descending=True)
    before = jnp.where(first, mass, 0.0).sum(-1, keepdims=True) + jnp.cumsum(sorted_mass, axis=-1) - sorted_mass
    is_short = before[..., :-1] < share * mass.sum(-1, keepdims=True)
    num_others = 1 + is_short.sum(-1, keepdims=True)
    return first | (choose.rank(jnp.where(first, -jnp.inf, mass)) < num_others)


@splits_over_mesh(whole=_whole)
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    threshold: float | tuple[float, ...] = 0.9,
    stride: int = 8,
    block_size: int = 128,
    is_causal: bool = True,
    chunk_size: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, of every query block over its chosen key blocks.

    Args:
      query: `[batch, queries, heads, head_dim]`, floating point. Causal: keys are longer by whole blocks, if at all.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      threshold: share of the mass that is kept, or one for each head, between 0 and 1.
      stride: tokens along a tile's side, a divisor of block_size.
      block_size: tokens in a block of queries or keys; the last may be shorter.
      is_causal: whether a query sees only keys up to its own position.
      chunk_size: None, or queries in a chunk of the authors' code for their choice (module docstring).
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
        threshold=threshold,
        stride=stride,
        block_size=block_size,
        is_causal=is_causal,
        chunk_size=chunk_size,
        scale=scale,
    )
    visibility = make_visibility(query, key, is_causal=is_causal)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
