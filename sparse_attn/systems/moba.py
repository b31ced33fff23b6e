"""MoBA: every query token attends the few key blocks whose mean key it matches best."""

import dataclasses
from typing import Unpack

import jax
from jax.typing import ArrayLike

from sparse_attn.attend.backends import Implementation
from sparse_attn.attention import moba_attention, route_moba
from sparse_attn.checks import check_positive, check_scale
from sparse_attn.decode.cache import CacheOptions
from sparse_attn.decode.moba import MoBACache, extend_moba_cache, init_moba_cache, moba_cached_attention
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

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        num_key_value_heads: int,
        head_dim: int,
        **options: Unpack[CacheOptions],
    ) -> MoBACache:
        """`sparse_attn.decode.init_moba_cache`."""
        self._check_causal()
        sizes = (batch_size, max_length, num_key_value_heads, head_dim)
        return init_moba_cache(*sizes, block_size=self.block_size, **options)

    def attend_cached(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: MoBACache,
        *,
        key_conv_kernel: jax.Array | None = None,
        num_new: ArrayLike | None = None,
    ) -> tuple[jax.Array, MoBACache]:
        """New tokens behind those of the cache: `extend_moba_cache`, then `moba_cached_attention`."""
        self._check_causal()
        if cache.block_size != self.block_size:
            raise ValueError(f"cache must have block_size={self.block_size}, got {cache.block_size}")
        cache = extend_moba_cache(cache, key, value, key_conv_kernel=key_conv_kernel, num_new=num_new)
        output = moba_cached_attention(
            query, cache, top_k=self.top_k, num_new=num_new, scale=self.scale, implementation=self.implementation
        )
        return output, cache

    def _check_causal(self) -> None:
        if not self.is_causal:
            raise ValueError("is_causal must be True to attend with a cache")
