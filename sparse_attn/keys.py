"""Key-side maths: the short convolution that lets a block's mean speak for single keys, and rotary positions."""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_integers
from sparse_attn.sharding import over_explicit_axes


def causal_key_convolution(key: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Adds to every key a gated mixture of itself and the keys just before it, channel by channel.

    out_t = key_t + silu(sum_l kernel[l] * key_{t-l}), l = 0 ... width - 1; terms before the start of the row, or of
    another segment than t, are absent. Neighbours of a relevant key thus come to resemble it, which raises the mean of
    its block. Source: FlashMoBA (arXiv 2511.11571), key convolution (widths 3 and 5).

    Args:
      key: `[batch, sequence, kv_heads, head_dim]`, floating point.
      kernel: `[width, kv_heads, head_dim]`, floating point; kernel[l] weighs the key l tokens back.
      segment_ids: int `[batch, sequence]`, for packed sequences: tokens of equal id form one segment. Distances are
        counted along the row, so a segment should be contiguous.

    Returns:
      Array of key's shape and dtype, computed in float32 (float64 stays float64).

    Raises:
      ValueError: an argument has a wrong shape or dtype.
    """
    key, kernel = map(jnp.asarray, (key, kernel))
    check_convolution(key, kernel)
    segment_ids = check_integers("segment_ids", segment_ids, key.shape[:2])
    return over_explicit_axes(_convolve, (key, kernel, segment_ids), ("b.k", ".k", "b"), "b.k")


def _convolve(key: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    dtype = jnp.promote_types(key.dtype, jnp.float32)
    kernel, num_tokens = kernel.astype(dtype), key.shape[1]
    exact_key = key.astype(dtype)
    mixture = exact_key * kernel[None, None, 0]
    for lag in range(1, min(kernel.shape[0], num_tokens)):
        earlier = _shift(exact_key, lag)
        if segment_ids is not None:
            is_same = segment_ids == _shift(segment_ids, lag)  # [batch, sequence]
            earlier = jnp.where(is_same[:, :, None, None], earlier, 0)
        mixture += earlier * kernel[None, None, lag]
    return (exact_key + jax.nn.silu(mixture)).astype(key.dtype)


def _shift(array: jax.Array, lag: int) -> jax.Array:
    """Moves `[batch, sequence, ...]` later by `lag` tokens, zeros at the front."""
    return jnp.pad(array[:, :-lag], ((0, 0), (lag, 0)) + ((0, 0),) * (array.ndim - 2))


def check_convolution(key: jax.Array, kernel: jax.Array) -> None:
    """Keys and the kernel of their convolution."""
    if key.ndim != 4 or not jnp.issubdtype(key.dtype, jnp.floating):
        raise ValueError(f"key must be a float [batch, sequence, kv_heads, head_dim], got {key.dtype}{key.shape}")
    if kernel.shape[1:] != key.shape[2:] or kernel.ndim != 3 or kernel.shape[0] < 1:
        raise ValueError(
            f"kernel must be [width, kv_heads, head_dim] = [width, {key.shape[2]}, {key.shape[3]}] with width at least "
            f"1, got kernel.shape={kernel.shape}"
        )
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel must be floating point, got kernel.dtype={kernel.dtype}")


def rotate(array: jax.Array, theta: float, positions: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding: channel pair i at position t turns by the angle t * theta^(-2 i / head_dim).

    A pair is (i, i + head_dim / 2). Products of rotated queries and keys depend on the difference of positions alone,
    so positions count along the row, packed or not. Turns add up: an array already rotated to p moves to p + t, and
    negative positions undo a rotation. Source: RoFormer (arXiv 2104.09864), section 3.2.

    Args:
      array: `[batch, sequence, heads, head_dim]`, head_dim even.
      theta: base of the wavelengths.
      positions: `[batch or 1, sequence]`, integers. None: 0, 1, 2, ... along the row.

    Returns:
      Array of the same shape and dtype; the arithmetic is float32 (float64 stays float64).

    Raises:
      ValueError: head_dim is odd.
    """
    num_tokens, head_dim = array.shape[1], array.shape[3]
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim=}")
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    positions = jnp.arange(num_tokens)[None] if positions is None else positions
    angle = positions.astype(dtype)[:, :, None, None] * frequency[None, None, None]  # [batch or 1, sequence, 1, pairs]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(array.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(array.dtype)
