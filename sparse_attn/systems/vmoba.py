"""VMoBA: MoBA for video. Blocks are boxes of space and time, and all queries of a head share one budget of pairs."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sparse_attn.attend.partial import Partial, as_partial
from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import check_one_of, check_positive, check_self_attention, check_share
from sparse_attn.grammar import choose, order, score
from sparse_attn.grammar.describe import block_mean
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System

Scope = Literal["query", "block", "head", "all"]

# Axes of the pairs that compete: h heads, t queries, j blocks.
_PAIRS_OF_SCOPE = {"query": "j", "block": "ht", "head": "jt", "all": "hjt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VMoBA(System):
    """VMoBA: MoBA for video. Blocks are boxes of space and time, and all queries of a head share one budget of pairs.

    Paper: VMoBA: Mixture-of-Block Attention for Video Diffusion Models (arXiv 2506.23858). Bidirectional. Keys are put
    in the order of boxes, which become the blocks: slabs of time, windows of space or boxes of both, in turn by layer
    (layer mod 3). Every query token scores every block by the dot product with its mean key, unscaled. The scores of a
    scope, by default of one head, compete: they are brought to 0..1 by their minimum and maximum, and the best pairs
    are kept until their sum reaches `threshold` of the whole. Every query keeps its own block, and that counts. The
    output is softmax attention over the kept blocks.

    The authors cut a video into 8, 48 and 72 boxes of the three kinds (time, space, both). The first quarter of their
    denoising steps is dense: a caller's matter, as is the turn of box_shape by layer.

    Where code and paper disagree, the authors' code (KwaiVGI/VMoBA at 4da72ff) is followed: it keeps the pair that
    crosses the line, and at least one pair besides the own blocks, however small the threshold. One error of theirs is
    corrected: they pack a batch into one sequence, so that minimum, maximum and budget of the scopes "head" and "all"
    run over all rows, which change each other's choice; here every row is for itself. Their code permutes the queries
    too, which changes nothing, since attention is bidirectional, and is not done here.

    Tokens come in raster order of frames, height and width; a packed row may hold several videos of one grid_shape.

    Attributes:
      grid_shape: frames, height and width of the video in tokens; tokens is their product.
      box_shape: `(frames,)`, `(height, width)` or `(frames, height, width)` of a box, see `order.boxes`.
      scope: which pairs compete for one budget: those of a "query" and head, of a "block" in all heads and queries, of
        a "head", or "all" of a row.
      threshold: share of the scope's sum of normalised scores that the kept pairs reach, between 0 and 1.
      top_k: instead of the threshold, keep as many pairs as `top_k` for every query of the scope; own blocks count.
    """

    grid_shape: tuple[int, int, int]
    box_shape: tuple[float, ...]
    scope: Scope = "head"
    threshold: float = 0.25
    top_k: int | None = None

    paper = "2506.23858"
    is_causal = False
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        order.boxes(self.grid_shape, self.box_shape)  # checks both
        check_one_of("scope", self.scope, get_args(Scope))
        check_share("threshold", self.threshold)
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
            if self.scope == "block":
                raise ValueError("top_k must be None with scope='block', which knows only a threshold")

    @property
    def whole(self) -> str:
        """Heads stay together where they compete for one budget."""
        return "h" if self.scope in ("block", "all") else ""

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_self_attention(query, key)
        if math.prod(self.grid_shape) != query.shape[1]:
            grid_shape = self.grid_shape
            raise ValueError(f"grid_shape must hold the {query.shape[1]} tokens of query, got {grid_shape=}")

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """Levels 0 and 1, `[batch, heads, tokens, boxes]`: queries in their own order, keys in that of the boxes."""
        token_order, block_size = order.boxes(self.grid_shape, self.box_shape)
        scores = score.dot(query, block_mean(key[:, token_order], block_size))  # [batch, heads, tokens, boxes]
        num_blocks = scores.shape[-1]
        own_block = order.inverse(token_order) // block_size  # [tokens]
        is_own = jnp.broadcast_to(own_block[:, None] == jnp.arange(num_blocks)[None], scores.shape)

        pairs = self._pairs
        axes = ["bhtj".index(axis) for axis in sorted(set("bhtj") - set(pairs)) + list(pairs)]
        transposed = scores.transpose(axes)
        rows = transposed.reshape(*transposed.shape[: -len(pairs)], -1)  # [..., pairs of a scope]
        own_rows = is_own.transpose(axes).reshape(rows.shape)
        if self.top_k is not None:
            queries_of_scope = rows.shape[-1] // num_blocks
            chosen = choose.top_k(jnp.where(own_rows, jnp.inf, rows), self.top_k * queries_of_scope)
        else:
            lowest, highest = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
            mass = (rows - lowest) / jnp.where(highest > lowest, highest - lowest, 1)
            best_other = jax.nn.one_hot(jnp.where(own_rows, -1, mass).argmax(-1), rows.shape[-1], dtype=bool)
            chosen = choose.top_p(mass, self.threshold, first=own_rows) | best_other
        chosen = chosen.reshape(transposed.shape).transpose([axes.index(axis) for axis in range(4)])
        key_order = jnp.broadcast_to(jnp.asarray(token_order), (*scores.shape[:2], token_order.size))
        return LevelMap(chosen.astype(jnp.int8), query_block_size=1, key_block_size=block_size, key_order=key_order)

    @property
    def _pairs(self) -> str:
        """The axes over which pairs compete, of b rows, h heads, t queries and j blocks."""
        return _PAIRS_OF_SCOPE[self.scope]

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        """Attention token by token: every query has a list of boxes of its own."""
        token_order, _ = order.boxes(self.grid_shape, self.box_shape)
        return as_partial(
            *block_sparse_attention(
                query,
                key[:, token_order],
                value[:, token_order],
                levels.to_selection(),
                is_causal=False,
                scale=self.factor(query),
                return_residual=True,
                implementation=self.implementation,
            )
        )
