"""PBS-Attn: keys are sorted inside segments, so that the important ones share blocks, before blocks are chosen."""

import dataclasses
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_positive
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.attend import permute_keys
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System, per_head

Pool = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PBSAttention(System):
    """PBS-Attn: keys are sorted inside segments, so that the important ones share blocks, before blocks are chosen.

    Paper: Sparser Block-Sparse Attention via Token Permutation (arXiv 2510.21270). Training-free causal prefill. In
    every whole segment the keys, and the values with them, are sorted by the mean softmax weight that the last block of
    queries gives them. Softmax does not depend on the order, and causality survives because no key leaves its segment
    and masks go by original positions. Block means of queries and sorted keys are compared, softmax(Q K^T / sqrt(d))
    over the blocks of earlier segments; a query block takes the shortest prefix whose mass reaches the threshold, the
    block that now holds the first token, and all blocks of its own segment. Rows of at most one segment are dense.

    Code and paper: no differences found; the authors' code (xinghaow99/pbs-attn at 8ce8e02) is followed, in which the
    sorting softmax runs over whole segments only and without causality, and a short last block is pooled with zeros for
    what is missing. Their code needs as many key/value heads as query heads. Here every query head sorts for itself,
    which under grouped heads makes a copy of keys and values for each of them.

    Attributes:
      threshold: share of the mass of earlier segments that is kept, between 0 and 1, of one block at least; a tuple:
        one for each head.
      block_size: tokens in a block of queries or keys; the last may be shorter.
      segment_size: tokens in a segment, a multiple of block_size.
      pool: what stands for a block, the "mean" or the "max" of its tokens; a pair: for queries and for keys.
      keep_first: whether the block that holds the first token is forced.
    """

    threshold: float | tuple[float, ...] = 0.9
    block_size: int = 128
    segment_size: int = 256
    pool: Pool | tuple[Pool, Pool] = "mean"
    keep_first: bool = True

    paper = "2510.21270"
    is_causal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)
        check_positive("segment_size", self.segment_size)
        if self.segment_size % self.block_size:
            raise ValueError(
                f"segment_size must be a multiple of block_size={self.block_size}, got segment_size={self.segment_size}"
            )
        if self.pool not in itertools.chain(get_args(Pool), itertools.product(get_args(Pool), repeat=2)):
            raise ValueError(f"pool must be one or two of {get_args(Pool)}, got pool={self.pool!r}")

    @property
    def whole(self) -> str:
        return "h" if isinstance(self.threshold, tuple) else ""

    def sort_scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Mean weight of the last block_size queries on every key of a whole segment, softmax over these keys.

        `[batch, tokens, heads or kv_heads, head_dim]` -> float32 `[batch, heads, keys of whole segments]`.
        """
        key = key[:, : key.shape[1] // self.segment_size * self.segment_size]
        return score.softmax(self.factor(query) * score.dot(query[:, -self.block_size :], key)).mean(2)

    def sort_keys(self, scores: jax.Array, num_keys: int) -> jax.Array:
        """The original key at each place: by falling score inside every whole segment, ties to the earlier key.

        `sort_scores` -> int32 `[batch, heads, num_keys]`. Keys behind the last whole segment, and all keys of a row of
        one segment, stay where they are.
        """
        batch, num_heads, num_sorted = scores.shape
        scores = scores if num_keys > self.segment_size else jnp.zeros_like(scores)
        segments = scores.reshape(batch, num_heads, -1, self.segment_size)
        order = jnp.argsort(segments, axis=-1, descending=True, stable=True)
        order += self.segment_size * jnp.arange(segments.shape[2])[:, None]
        rest = jnp.broadcast_to(jnp.arange(num_sorted, num_keys), (batch, num_heads, num_keys - num_sorted))
        return jnp.concatenate([order.reshape(scores.shape), rest], axis=-1).astype(jnp.int32)

    def scores(self, query: jax.Array, permuted_key: jax.Array) -> jax.Array:
        """Softmax of scaled dot products of pooled blocks over the blocks of earlier segments, 0 elsewhere.

        `[batch, tokens, heads, head_dim]`, keys as `permute_keys` gives them -> float32 `[batch, heads, query_blocks,
        key_blocks]`.
        """
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        pools = (self.pool, self.pool) if isinstance(self.pool, str) else self.pool
        blocks = (split_blocks(array.astype(dtype), self.block_size) for array in (query, permuted_key))
        pooled = (array.mean(2) if pool == "mean" else array.max(2) for array, pool in zip(blocks, pools, strict=True))
        scores = self.factor(query) * score.dot(*pooled)
        segment = jnp.arange(scores.shape[-1]) * self.block_size // self.segment_size
        return score.softmax(scores, segment[None, :] < segment[:, None])

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        share = jnp.maximum(per_head(self.threshold, query.shape[2]), 1e-37)  # takes one block at least
        order = self.sort_keys(self.sort_scores(query, key), key.shape[1])
        probability = self.scores(query, permute_keys(key, order))
        block = jnp.arange(probability.shape[-1])
        segment = block * self.block_size // self.segment_size
        is_first = ((order == 0).argmax(-1) // self.block_size)[:, :, None, None] == block  # holds the first token
        chosen = choose.top_p(probability, share) | (self.keep_first & is_first & (segment <= segment[:, None]))
        chosen |= segment == segment[:, None]  # in sorted segments later blocks hold earlier keys too
        return LevelMap(chosen.astype(jnp.int8), self.block_size, self.block_size, order)
