"""The key convolution as a module."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from sparse_attn.checks import check_positive
from sparse_attn.keys import causal_key_convolution

# Normal with variance 1 / (3 width), that of the uniform distribution over +-1 / sqrt(width): small beside a key, but
# not zero, so that the gate has a gradient from the first step.
default_kernel_init = nnx.initializers.variance_scaling(
    1 / 3, "fan_in", "normal", in_axis=0, out_axis=(), batch_axis=(1, 2)
)


class KeyConv(nnx.Module):
    """Short causal depthwise convolution over keys: key_t + silu(sum_l kernel[l] * key_{t-l}).

    Source: FlashMoBA (arXiv 2511.11571), key convolution; the paper uses widths 3 and 5.

    Args:
      num_heads: key heads.
      head_dim: channels of a head.
      width: tokens that the convolution spans, the current one included, at least 1.
      dtype: dtype of the result; None for the key's. The arithmetic is float32.
      param_dtype: dtype of the kernel.
      kernel_init: initialiser of the kernel `[width, num_heads, head_dim]`.
      rngs: stream "params".
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        width: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        check_positive("width", width)
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, num_heads, head_dim), param_dtype))

    def __call__(self, key: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Convolves keys `[batch, sequence, num_heads, head_dim]`, not across segments (int `[batch, sequence]`)."""
        key = key if self.dtype is None else key.astype(self.dtype)
        return causal_key_convolution(key, self.kernel[...], segment_ids)
