"""MoBA: every query token attends the few key blocks whose mean key it matches best."""

import dataclasses

import jax
from jax.typing import ArrayLike

from sparse_attn.attend.backends import Implementation
from sparse_attn.attention import moba_attention, route_moba
from sparse_attn.checks import check_positive, check_scale
from sparse_attn.selection import BlockSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBA:
    """MoBA: every query token attends the few key blocks whose mean key it matches best.

    Paper: MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189). `sparse_attn.moba_attention` with
    its sizes bound.

    Where code and paper disagree: some implementations take full attention for top_k=1; here it is the own block (S2).

    Attributes:
      block_size: keys in a block, at least 1.
      top_k: blocks that a query attends, its own included, at least 1.
      is_causal: whether a token sees only tokens up to itself.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      implementation: as in `moba_attention`.
    """

    block_size: int
    top_k: int
    is_causal: bool = True
    scale: float | None = None
    implementation: Implementation | None = None

    paper = "2502.13189"
    is_trainable = True
    traces_sequences = True

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        check_positive("top_k", self.top_k)
        check_scale(self.scale)

    def select(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> BlockSelection:
        """`sparse_attn.route_moba`."""
        return route_moba(
            query,
            key,
            block_size=self.block_size,
            top_k=self.top_k,
            is_causal=self.is_causal,
            segment_ids=segment_ids,
            seq_lengths=seq_lengths,
            implementation=self.implementation,
        )

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """`sparse_attn.moba_attention`."""
        return moba_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            top_k=self.top_k,
            is_causal=self.is_causal,
            scale=self.scale,
            segment_ids=segment_ids,
            seq_lengths=seq_lengths,
            implementation=self.implementation,
        )
