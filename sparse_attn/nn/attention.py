"""What the attention modules share: projections, key convolution, padding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from sparse_attn.checks import check_integers
from sparse_attn.nn import key_conv

default_kernel_init = nnx.initializers.lecun_normal()


class SelfAttention(nnx.Module):
    """Multi-head self-attention: out(attend(query(x), key_conv(key(x)), value(x))). Subclasses define `attend`.

    Parameters: query.kernel `[in_features, num_heads, head_dim]`, key.kernel and value.kernel `[in_features,
    num_key_value_heads, head_dim]`, out.kernel `[num_heads, head_dim, in_features]`, key_conv.kernel `[width,
    num_key_value_heads, head_dim]`. To shard them, wrap the initialisers in `nnx.with_partitioning`.

    Args:
      in_features: features of a token, in and out.
      num_heads: query heads.
      num_key_value_heads: key and value heads, a divisor of num_heads; None for num_heads.
      head_dim: features of a head; None for in_features / num_heads.
      key_conv_width: tokens that the key convolution spans, 0 for none. The paper uses 3 and 5.
      use_bias: whether the projections have biases.
      dtype: dtype of the computation; None for the promotion of inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the query, key and value kernels.
      out_kernel_init: initialiser of the output kernel; None for kernel_init.
      key_conv_init: initialiser of the convolution kernel.
      rngs: stream "params".
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
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        key_conv_init: Initializer = key_conv.default_kernel_init,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads must be a divisor of {num_heads=}, got num_key_value_heads={num_key_value_heads}"
            )
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(f"num_heads must divide {in_features=} unless head_dim is given, got {num_heads=}")
            head_dim = in_features // num_heads
        if key_conv_width < 0:
            raise ValueError(f"key_conv_width must be 0 (none) or a width of at least 1, got {key_conv_width=}")
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def project_in(heads: int) -> nnx.LinearGeneral:
            shape = (heads, head_dim)
            return nnx.LinearGeneral(
                in_features, shape, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs, **dtypes
            )

        self.in_features = in_features
        self.query = project_in(num_heads)
        self.key = project_in(kv_heads)
        self.value = project_in(kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features,
            axis=(-2, -1),
            use_bias=use_bias,
            kernel_init=out_kernel_init or kernel_init,
            rngs=rngs,
            **dtypes,
        )
        self.key_conv = nnx.data(
            key_conv.KeyConv(kv_heads, head_dim, key_conv_width, kernel_init=key_conv_init, rngs=rngs, **dtypes)
            if key_conv_width
            else None
        )

    def project(
        self, inputs: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values exactly as attention (and MoBA's router) takes them, the convolution applied.

        Args:
          inputs: `[batch, sequence, in_features]`.
          segment_ids: int `[batch, sequence]`.

        Returns:
          query `[batch, sequence, num_heads, head_dim]`; key and value `[batch, sequence, kv_heads, head_dim]`.
        """
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        return query, key if self.key_conv is None else self.key_conv(key, segment_ids), value

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        seq_lengths: jax.Array | None,
    ) -> jax.Array:
        """Attention output `[batch, sequence, num_heads, head_dim]` of what `project` returns."""
        raise NotImplementedError

    def __call__(
        self, inputs: jax.Array, *, segment_ids: jax.Array | None = None, seq_lengths: jax.Array | None = None
    ) -> jax.Array:
        """Attends within each row.

        Args:
          inputs: `[batch, sequence, in_features]`.
          segment_ids: int `[batch, sequence]`, for packed sequences: tokens of equal id form one segment.
          seq_lengths: int `[batch]`, real tokens of each row; later ones are padding, and zeros come out there.

        Returns:
          Array of inputs' shape.

        Raises:
          ValueError: inputs, segment_ids or seq_lengths has a wrong shape or dtype.
        """
        if inputs.ndim != 3 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs must be [batch, sequence, {self.in_features}], got inputs.shape={inputs.shape}")
        segment_ids = check_integers("segment_ids", segment_ids, inputs.shape[:2])
        seq_lengths = check_integers("seq_lengths", seq_lengths, inputs.shape[:1])

        def empty_padding(tokens: jax.Array) -> jax.Array:
            if seq_lengths is None:
                return tokens
            is_real = jnp.arange(tokens.shape[1])[None] < seq_lengths[:, None]  # [batch, sequence]
            return jnp.where(is_real[:, :, None], tokens, 0)

        query, key, value = self.project(empty_padding(inputs), segment_ids)
        return empty_padding(self.out(self.attend(query, key, value, segment_ids, seq_lengths)))
