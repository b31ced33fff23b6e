"""XAttention: antidiagonals of the logits tell how much attention a pair of blocks holds.

Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428). Training-free prefill. Logits
are averaged along the antidiagonal of every tile of stride x stride tokens. Softmax over the tiles of a row, then the
sum inside each pair of blocks. Every query block takes the shortest prefix of key blocks by falling score whose mass
reaches `threshold`; the first block and the diagonal stand in front of all others, and their mass counts.

Defaults: blocks of 128, stride 8 (or 16), threshold 0.9 (the paper searches one for each layer and head).

Where code and paper disagree. The abstract speaks of sums of attention values; both compute means of logits before the
softmax, which is followed. In the authors' code (mit-han-lab/x-attention at e379887), the chunk of queries that starts
at the first block - all of them, up to 16K tokens - credits the diagonal alone and keeps one block more than the
shortest prefix. Rows are filled up to whole chunks with zeros, after which diagonals are aligned; without causality
these zeros count as keys, and column 0 is chosen anyway. `chunk_size` gives that choice, None the described one.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.checks import check_arrays, check_attention, check_positive, check_whole_blocks
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="XAttention",
    paper="2503.16428",
    blocks="128 / 128",
    describe="strides of tokens, queries in reverse order",
    score="softmax of the mean logit of antidiagonals, summed in a pair of blocks",
    choose="per query block and head: share of the mass; first block and diagonal forced and credited",
    when="prefill; video: dense in the first 5 steps",
)

Mode = Literal["inverse", "slash", "double", "triple"]
_SHIFTS: dict[Any, tuple[int, ...]] = {"double": (-1,), "triple": (-1, 1)}


def score_blocks(
    query: jax.Array,
    key: jax.Array,
    *,
    stride: int,
    block_size: int,
    is_causal: bool,
    scale: float,
    mode: Mode | tuple[int, ...] = "inverse",
    chunk_size: int | None = None,
) -> jax.Array:
    """Softmax weights of the tiles of stride x stride tokens, summed in every pair of blocks. Args: those of `select`.

    Tile (r, c) has the logit scale / stride * sum_j q[r stride + stride - 1 - j] . k[c stride + j]; causal, tile row r
    sees the tile columns up to its own. Rows behind the last query are zero; one query block's tiles are alive at once.

    float32 `[batch, heads, query_blocks, key_blocks (of whole chunks)]`; rows sum to the tile rows that queries fill.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    diagonal = _first_diagonal(query, key, chunk_size or block_size) // block_size
    if chunk_size is not None:
        key = split_blocks(key, chunk_size).reshape(batch, -1, *key.shape[2:])
    num_keys, kv_heads = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    tiles = block_size // stride  # of a block
    query = split_blocks(query.astype(dtype), block_size)
    query = query.reshape(batch, -1, tiles, stride, kv_heads, num_heads // kv_heads, head_dim)
    key = split_blocks(key.astype(dtype), block_size).reshape(batch, -1, stride, kv_heads, head_dim)
    for shift in _SHIFTS.get(mode, ()):
        key += jnp.roll(key, shift, axis=2)
    if mode != "slash":
        key = key[:, :, ::-1] if isinstance(mode, str) else key[:, :, np.argsort(mode)]
    column, key_blocks = jnp.arange(key.shape[1])[None, :], key.shape[1] // tiles

    def score_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, first = block  # [batch, tiles, stride, kv_heads, group, head_dim], first tile row
        # Axes: t tile rows, c tile columns, n tokens of a tile.
        logits = jnp.einsum("btnkgd,bcnkd->bkgtc", query, key, precision="highest") * (scale / stride)
        row = first + jnp.arange(tiles)[:, None]
        is_seen = (column * stride < num_keys) & (row * stride < num_queries)
        if is_causal:
            is_seen &= column <= row + diagonal * tiles
        weights = score.softmax(logits, is_seen[None, None, None])
        return weights.reshape(batch, num_heads, tiles, key_blocks, tiles).sum((2, 4))

    blocks = query.swapaxes(0, 1), jnp.arange(query.shape[1]) * tiles
    return jnp.moveaxis(jax.lax.map(score_block, blocks), 0, 2)


def _first_diagonal(query: jax.Array, key: jax.Array, size: int) -> int:
    """The first query's place among the keys, both filled up to a multiple of size."""
    return (-(-key.shape[1] // size) + -query.shape[1] // size) * size


# Heads stay together where each has its own threshold.
_split = functools.partial(splits_over_mesh, whole=lambda options: "h" * isinstance(options.get("threshold"), tuple))


@_split("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    threshold: float | tuple[float, ...] = 0.9,
    stride: int = 8,
    block_size: int = 128,
    is_causal: bool = True,
    mode: Mode | tuple[int, ...] = "inverse",
    norm: float = 1.0,
    keep_sink: bool = False,
    keep_recent: bool = False,
    chunk_size: int | None = None,
    scale: float | None = None,
) -> LevelMap:
    """Which key blocks each query block attends. Args: those of `attention`, and
    threshold: share of the mass that is kept, or one for each head, between 0 and 1.
    stride, block_size: tokens along a tile's side, a divisor of the tokens in a block; the last may be shorter.
    mode: what meets in a tile. "inverse": antidiagonals; "slash": diagonals; "double", "triple": antidiagonals, of
      each key plus the next, or twice the key plus both neighbours, in a ring; or the query that each key meets, a
      permutation of range(stride) (the authors' "random").
    norm: divides the logits of the scores, not those of attention.
    keep_sink: the first query block keeps all that it sees (as published; meant was the first column).
    keep_recent: keep the diagonal, without causality too.
    chunk_size: None, or queries in a chunk of the authors' code for their choice (module docstring).
    """
    check_arrays(query, {"key": key})
    check_positive("stride", stride)
    check_positive("block_size", block_size)
    size = block_size if chunk_size is None else chunk_size
    if block_size % stride or size < 1 or size % block_size:
        raise ValueError(f"stride must divide block_size, and that chunk_size, got {stride=}, {block_size=}, {size=}")
    if is_causal and chunk_size is None:
        check_whole_blocks(query, key, block_size)
    if isinstance(threshold, tuple) and len(threshold) != query.shape[2]:
        raise ValueError(f"threshold must be a number or one for each of {query.shape[2]} heads, got {threshold=}")
    if mode not in get_args(Mode) and sorted(mode) != list(range(stride)):
        raise ValueError(f"mode must be one of {get_args(Mode)} or a permutation of {stride} numbers, got {mode=}")
    share = jnp.asarray(threshold, jnp.float32).reshape(-1, 1, 1)  # [heads or 1, 1, 1]
    query, key = jax.lax.stop_gradient((query, key))
    sizes: dict[str, Any] = {"stride": stride, "block_size": block_size, "chunk_size": chunk_size}
    scale = (query.shape[-1] ** -0.5 if scale is None else scale) / norm
    mass = score_blocks(query, key, is_causal=is_causal, mode=mode, scale=scale, **sizes)
    diagonal = _first_diagonal(query, key, size) // block_size
    row, column = jnp.arange(mass.shape[2])[:, None] + diagonal, jnp.arange(mass.shape[3])[None]
    chosen = choose.top_p(mass, share, (column == 0) | (column == row)) if is_causal else choose.top_p(mass, share)
    if is_causal and chunk_size is not None and diagonal == 0:
        kept = choose.top_p(mass, share, column == row).sum(-1, keepdims=True)
        longer = choose.rank(jnp.where(column == row, jnp.inf, mass)) < kept + (share > 0)
        chosen = jnp.where(row < chunk_size // block_size, longer, chosen)
    chosen |= (chunk_size is not None) & (column == 0)
    chosen |= (keep_recent & (column == row)) | (keep_sink & (row == diagonal))
    chosen = (chosen & ((column <= row) | (not is_causal)))[..., : -(-key.shape[1] // block_size)]
    return LevelMap(chosen.astype(jnp.int8), block_size, block_size)


@_split()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, of every query block over its chosen key blocks; like query.

    Args:
      query: `[batch, queries, heads, head_dim]`, floating point. Causal: keys are longer by whole blocks, if at all.
      key, value: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      is_causal, scale: whether a query sees no later keys; factor of the logits, None: 1 / sqrt(head_dim).
      options: the others of `select`.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(query, key, is_causal=is_causal, scale=scale, **options)
    visibility = make_visibility(query, key, is_causal=is_causal)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
