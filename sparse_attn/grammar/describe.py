"""Describe: what a block of tokens is known by."""

import jax
import jax.numpy as jnp


def split_blocks(array: jax.Array, block_size: int) -> jax.Array:
    """Cuts `[batch, tokens, heads, x]` into `[batch, blocks, block_size, heads, x]`, zeros behind the last token."""
    batch, num_tokens, *rest = array.shape
    array = jnp.pad(array, ((0, 0), (0, -num_tokens % block_size)) + ((0, 0),) * len(rest))
    return array.reshape(batch, -1, block_size, *rest)


def block_lengths(num_tokens: int, block_size: int) -> jax.Array:
    """Tokens in every block, int32 `[blocks]`: block_size, and what is left in the last."""
    return jnp.minimum(block_size, num_tokens - jnp.arange(0, num_tokens, block_size, dtype=jnp.int32))


def block_mean(array: jax.Array, block_size: int) -> jax.Array:
    """Mean over the tokens of every block, in float32; the mean of a short last block runs over the tokens it has.

    Args:
      array: `[batch, tokens, heads, head_dim]`.
      block_size: tokens in a block.

    Returns:
      float32 (float64 for float64) `[batch, blocks, heads, head_dim]`.
    """
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return split_blocks(array, block_size).sum(2) / block_lengths(array.shape[1], block_size)[None, :, None, None]
