"""Sliding-window attention with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from sparse_attn.keys import rotate
from sparse_attn.nn.attention import SelfAttention, default_kernel_init
from sparse_attn.window import sliding_window_attention


class SlidingWindowAttention(SelfAttention):
    """Causal self-attention to the last `window_size` tokens, with rotary position embedding of queries and keys.

    Args:
      window_size: tokens that a token sees, itself included, at least 1.
      rope_theta: base of the rotary wavelengths, see `rotate`.
      others: as in `SelfAttention`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int,
        rope_theta: float = 10_000.0,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            rngs=rngs,
        )
        self.window_size = window_size
        self.rope_theta = rope_theta

    def project(
        self, inputs: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = super().project(inputs, segment_ids)
        return rotate(query, self.rope_theta), rotate(key, self.rope_theta), value

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        seq_lengths: jax.Array | None,
    ) -> jax.Array:
        # No length is needed: padding comes after every real token, and attention is causal.
        return sliding_window_attention(query, key, value, window_size=self.window_size, segment_ids=segment_ids)
