"""VMoBA: MoBA for video. Blocks are boxes of space and time, and all queries of a head share one budget of pairs.

Paper: VMoBA: Mixture-of-Block Attention for Video Diffusion Models (arXiv 2506.23858). Keys are put in the order of
boxes, which become the blocks: slabs of time, windows of space or boxes of both, in turn by layer (layer mod 3). Every
query token scores every block by the dot product with its mean key, unscaled. The scores of a scope, by default of one
head, compete: brought to 0..1 by their minimum and maximum, the best pairs are kept until their sum reaches `threshold`
of the whole. Every query keeps its own block, and that counts. Not causal; softmax over the kept blocks.

Defaults: scope "head", threshold 0.25; 8, 48 and 72 boxes in all for the three kinds (time, space, both). The first
quarter of the denoising steps is dense: a caller's matter, as is the turn of box_shape by layer.

Where code and paper disagree. The code (KwaiVGI/VMoBA at 4da72ff) keeps the pair that crosses the line and at least one
pair besides the own blocks, however small the threshold, which is followed. It packs a batch into one sequence, so that
minimum, maximum and budget of the scopes "head" and "all" run over all rows, and rows change each other's choice. Here
every row is for itself; `is_batch_packed` gives the published behaviour. The code permutes the queries too; as all see
the same keys, that changes nothing and is not done here.
"""

import math
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp

from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, order, score
from sparse_attn.grammar.describe import block_mean
from sparse_attn.selection import LevelMap
from sparse_attn.systems.recipe import Recipe

RECIPE = Recipe(
    name="VMoBA",
    paper="2506.23858",
    order="boxes of time, of space, of both, by layer mod 3",
    blocks="1 / box, of which a video has 8, 48 or 72",
    describe="mean key",
    score="dot; minimum and maximum of the scope to 0 and 1",
    choose="per head over all its pairs: share of the sum; own block forced and credited",
    when="dense in the first quarter of the denoising steps",
    is_trainable=True,
)

Scope = Literal["query", "block", "head", "all"]

_PAIRS_OF_SCOPE = {
    "query": "j",
    "block": "ht",
    "head": "jt",
    "all": "hjt",
}  # axes: b rows, h heads, t queries, j blocks


def select(
    query: jax.Array,
    key: jax.Array,
    *,
    grid_shape: tuple[int, int, int],
    box_shape: tuple[float, ...],
    scope: Scope = "head",
    threshold: float = 0.25,
    top_k: int | None = None,
    is_batch_packed: bool = False,
) -> LevelMap:
    """Which boxes each query attends. Args: those of `attention`.

    Returns:
      LevelMap of levels 0 and 1, `[batch, heads, tokens, boxes]`: queries in their own order, boxes in that of
      `order.boxes`.
    """
    check_self_attention(query, key)
    if math.prod(grid_shape) != query.shape[1]:
        raise ValueError(f"grid_shape must hold the {query.shape[1]} tokens of query, got {grid_shape=}")
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {get_args(Scope)}, got {scope=}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold=}")
    if top_k is not None:
        check_positive("top_k", top_k)
        if scope == "block":
            raise ValueError("top_k must be None with scope='block', which knows only a threshold")
    token_order, block_size = order.boxes(grid_shape, box_shape)
    query, key = jax.lax.stop_gradient((query, key))
    scores = score.dot(query, block_mean(key[:, token_order], block_size))  # [batch, heads, tokens, boxes]
    num_blocks = scores.shape[-1]
    own_block = order.inverse(token_order) // block_size  # [tokens]
    is_own = jnp.broadcast_to(own_block[:, None] == jnp.arange(num_blocks)[None], scores.shape)

    pairs = _PAIRS_OF_SCOPE[scope]
    if is_batch_packed and scope in ("head", "all"):
        pairs = "b" + pairs
    axes = ["bhtj".index(axis) for axis in sorted(set("bhtj") - set(pairs)) + list(pairs)]
    transposed = scores.transpose(axes)
    rows = transposed.reshape(*transposed.shape[: -len(pairs)], -1)  # [..., pairs of a scope]
    own_rows = is_own.transpose(axes).reshape(rows.shape)
    if top_k is not None:
        queries_of_scope = rows.shape[-1] // num_blocks
        chosen = choose.top_k(jnp.where(own_rows, jnp.inf, rows), top_k * queries_of_scope)
    else:
        lowest, highest = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
        mass = (rows - lowest) / jnp.where(highest > lowest, highest - lowest, 1)
        best_other = jax.nn.one_hot(jnp.where(own_rows, -1, mass).argmax(-1), rows.shape[-1], dtype=bool)
        chosen = choose.top_p(mass, threshold, first=own_rows) | best_other
    chosen = chosen.reshape(transposed.shape).transpose([axes.index(axis) for axis in range(4)])
    return LevelMap(chosen.astype(jnp.int8), query_block_size=1, key_block_size=block_size)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    grid_shape: tuple[int, int, int],
    box_shape: tuple[float, ...],
    scope: Scope = "head",
    threshold: float = 0.25,
    top_k: int | None = None,
    is_batch_packed: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, of every token over the boxes that `select` gives it.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point; tokens in raster order of frames, height and width.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads and every query head
        chooses for itself.
      value: shaped like key.
      grid_shape: frames, height and width of the video in tokens; tokens is their product.
      box_shape: `(frames,)`, `(height, width)` or `(frames, height, width)` of a box, see `order.boxes`.
      scope: which pairs compete for one budget: those of a "query" and head, of a "block" in all heads and queries, of
        a "head", or "all" of a row.
      threshold: share of the scope's sum of normalised scores that the kept pairs reach, between 0 and 1.
      top_k: instead of the threshold, keep as many pairs as `top_k` for every query of the scope; own blocks count.
      is_batch_packed: let the scopes "head" and "all" run over all rows of the batch, as published.
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
        grid_shape=grid_shape,
        box_shape=box_shape,
        scope=scope,
        threshold=threshold,
        top_k=top_k,
        is_batch_packed=is_batch_packed,
    )
    token_order, _ = order.boxes(grid_shape, box_shape)
    key, value = key[:, token_order], value[:, token_order]
    output = block_sparse_attention(query, key, value, levels.to_selection(), is_causal=False, scale=scale)
    return cast(jax.Array, output)  # without return_residual
