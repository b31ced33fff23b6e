"""Combiner, fixed form: every token attends its own region token by token and each other region through a summary."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.checks import check_positive
from sparse_attn.grammar import rest, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System


def summarize(
    query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The key k~_r and the value sum_j p(j | r) v_j of every region.

    Args:
      query: `[batch, tokens, heads, head_dim]`.
      key: `[batch, tokens, kv_heads, head_dim]`.
      value: shaped like key.
      block_size: tokens in a region.
      scale: factor of the logits q~_r k_j.

    Returns:
      Both float32 (float64 for float64) `[batch, regions, heads, head_dim]`: the weights come from queries, so every
      query head has a value of its own. The keys are repeated to as many heads; there is one a region.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    kv_heads, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (split_blocks(array.astype(dtype), block_size) for array in (query, key, value))
    is_there = split_blocks(jnp.ones((1, num_tokens, 1, 1), bool), block_size)  # [1, regions, block_size, 1, 1]
    largest_query, largest_key = (jnp.where(is_there, array, -jnp.inf).max(2) for array in (query, key))
    grouped = largest_query.reshape(batch, -1, kv_heads, num_heads // kv_heads, head_dim)
    # Axes: b batch, r regions, k key/value heads, g query heads of one, s keys of a region, d head_dim.
    logits = scale * jnp.einsum("brkgd,brskd->brkgs", grouped, key, precision="highest")
    weight = score.softmax(logits, is_there[:, :, None, None, :, 0, 0])
    mean = jnp.einsum("brkgs,brskd->brkgd", weight, value, precision="highest")
    return largest_key.repeat(num_heads // kv_heads, axis=2), mean.reshape(batch, -1, num_heads, head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combiner(System):
    """Combiner-Fixed: every token attends its own region token by token and each other region through a summary.

    Paper: Combiner: Full Attention Transformer with Sparse Computation Cost (arXiv 2107.05768). Attention is an
    expectation over p(j | i), the weight of key j for query i. Keys j of i's own region are met directly; a key of
    another region r has p(j | i) = p(r | i) p(j | r), where p(j | r) knows nothing of i, so that all queries share the
    mean value of a region. Every key thus gets a weight above 0, at the cost of a sparse pattern: of order length^1.5
    for regions of about the square root of the length.

    Combiner-Fixed is the variant that is a single softmax over disjoint keys. Regions are blocks. With q~_r and k~_r
    the largest query and key of region r, channel by channel, and logits times the scale:
        p(j | r) = softmax over j in r of q~_r k_j; value of the region: sum over j of p(j | r) v_j;
        p(j | i) for own j and p(r | i): one softmax over q_i k_j for own keys j and q_i k~_r for the other regions r.
    A region counts once, not once for each of its tokens. Causal: own keys up to i, and earlier regions. The log-sparse
    and axial variants (nested or crossing regions) and learned summaries are not here.

    Where code and paper disagree: the authors' code (google-research/google-research, combiner/: `sqrt_fixed_full` in
    TF, `_SelfAttSqrtn` in JAX) is followed in its default pooling, the maximum. Corrected: without causality the TF
    code counts the own region twice, directly and through its summary; here its summary is left out.

    Attributes:
      block_size: tokens in a region, at least 1; the last may be shorter.
      is_causal: whether a query sees only keys up to its own place, and only earlier regions.
    """

    block_size: int = 128
    is_causal: bool = True

    paper = "2107.05768"
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """Level 1 for the own region, 2 (summary) for others, 0 for later ones if causal; alike in all heads."""
        grid = Grid.of(query, key, self.block_size, is_causal=self.is_causal)
        levels = jnp.where(grid.diagonal, 1, 2)
        return grid.choose(jnp.broadcast_to(levels, (query.shape[0], query.shape[2], *levels.shape)))

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        size, scale = self.block_size, self.factor(query)
        stand_ins = summarize(query, key, value, block_size=size, scale=scale)
        no_count = jnp.zeros((1, 1))  # a region counts as one key
        others = rest.pooled(query, *stand_ins, no_count, levels.levels == 2, query_block_size=size, scale=scale)
        return merge(super()._attend(query, key, value, levels), others)
