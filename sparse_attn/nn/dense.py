"""Dense attention behind the interface of the sparse modules: the ceiling to compare them with."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from sparse_attn.nn import key_conv
from sparse_attn.nn.attention import SelfAttention, default_kernel_init


class DenseAttention(SelfAttention):
    """Self-attention to every token, with `jax.nn.dot_product_attention`; time is quadratic in the sequence.

    Args:
      is_causal: whether a token sees only tokens up to itself.
      others: as in `SelfAttention`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        key_conv_width: int = 0,
        use_bias: bool = False,
        is_causal: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        key_conv_init: Initializer = key_conv.default_kernel_init,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            key_conv_width=key_conv_width,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            key_conv_init=key_conv_init,
            rngs=rngs,
        )
        self.is_causal = is_causal

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        seq_lengths: jax.Array | None,
    ) -> jax.Array:
        mask = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=self.is_causal, key_value_seq_lengths=seq_lengths
        )
