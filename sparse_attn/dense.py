"""Dense attention as a value: the ceiling to compare sparse attention with."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.decode.cache import CacheOptions
from sparse_attn.decode.dense import DenseCache, dense_cached_attention, extend_dense_cache, init_dense_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Attention to every token with `jax.nn.dot_product_attention`; time is quadratic in the sequence.

    Attributes:
      is_causal: whether a token sees only tokens up to itself.
    """

    is_causal: bool = True

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """softmax(q K^T / sqrt(head_dim)) V.

        Args:
          query: `[batch, sequence, heads, head_dim]`, floating point.
          key: `[batch, sequence, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          segment_ids: int `[batch, sequence]`, for packed sequences: tokens see only tokens of equal id.
          seq_lengths: int `[batch]`, real tokens of each row; what comes out behind them is of no use.

        Returns:
          Array of query's shape and dtype.
        """
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]
        lengths = None if seq_lengths is None else jnp.asarray(seq_lengths, jnp.int32)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=self.is_causal, key_value_seq_lengths=lengths
        )

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        num_key_value_heads: int,
        head_dim: int,
        **options: Unpack[CacheOptions],
    ) -> DenseCache:
        """`sparse_attn.decode.init_dense_cache`."""
        self._check_causal()
        return init_dense_cache(batch_size, max_length, num_key_value_heads, head_dim, **options)

    def attend_cached(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: DenseCache,
        *,
        key_conv_kernel: jax.Array | None = None,
        num_new: ArrayLike | None = None,
    ) -> tuple[jax.Array, DenseCache]:
        """New tokens behind those of the cache: `extend_dense_cache`, then `dense_cached_attention`."""
        self._check_causal()
        cache = extend_dense_cache(cache, key, value, key_conv_kernel=key_conv_kernel, num_new=num_new)
        return dense_cached_attention(query, cache, num_new=num_new), cache

    def _check_causal(self) -> None:
        if not self.is_causal:
            raise ValueError("is_causal must be True to attend with a cache")
