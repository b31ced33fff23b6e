"""Dense attention as a value: the ceiling to compare sparse attention with."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


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
