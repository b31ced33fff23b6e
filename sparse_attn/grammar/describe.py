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


def block_spread(array: jax.Array, block_size: int) -> jax.Array:
    """Mean absolute difference of a block's tokens from their mean; arguments and result as in `block_mean`."""
    mean = block_mean(array, block_size).repeat(block_size, axis=1)[:, : array.shape[1]]
    return block_mean(jnp.abs(array - mean), block_size)


def draw_places(random_key: jax.Array, array: jax.Array, block_size: int, samples: int) -> jax.Array:
    """Random places in a block, none twice, for every row and head of `[batch, tokens, heads, x]`.

    int32 `[batch, heads, samples]`, below block_size.
    """
    places = jnp.broadcast_to(jnp.arange(block_size, dtype=jnp.int32), (array.shape[0], array.shape[2], block_size))
    return jax.random.permutation(random_key, places, axis=2, independent=True)[:, :, :samples]


def sample_blocks(array: jax.Array, places: jax.Array, block_size: int) -> jax.Array:
    """The tokens at the same few places in every block; a place behind the last token stands for the last.

    Args:
      array: `[batch, tokens, heads, head_dim]`.
      places: int32 `[batch, heads, samples]`, in a block, below block_size.
      block_size: tokens in a block.

    Returns:
      `[batch, blocks * samples, heads, head_dim]`, block by block.
    """
    batch, num_tokens, num_heads, _ = array.shape
    start = jnp.arange(0, num_tokens, block_size, dtype=jnp.int32)
    token = jnp.minimum(
        start[None, None, :, None] + places[:, :, None], num_tokens - 1
    )  # [batch, heads, blocks, samples]
    token = token.reshape(batch, num_heads, -1).swapaxes(1, 2)
    return jnp.take_along_axis(array, token[..., None], axis=1)


def pair_similarity(array: jax.Array, block_size: int, distance: int) -> jax.Array:
    """Mean cosine, over every block, of its tokens n (distance + 1) and n (distance + 1) + distance, for all n.

    Args:
      array: `[batch, tokens, heads, head_dim]`.
      block_size: tokens in a block, a multiple of distance + 1.
      distance: at least 1.

    Returns:
      float32 (float64 for float64) `[batch, blocks, heads]`; -1, as if opposite, for a last block without a whole pair.
    """
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    norm = jnp.sqrt(jnp.square(array).sum(-1, keepdims=True))
    array = split_blocks(array / jnp.maximum(norm, 1e-8), block_size)
    cosine = (array[:, :, :: distance + 1] * array[:, :, distance :: distance + 1]).sum(-1)  # [batch, blocks, n, heads]
    pairs = (block_lengths(norm.shape[1], block_size) // (distance + 1))[None, :, None]
    return jnp.where(pairs > 0, cosine.sum(2) / jnp.maximum(pairs, 1), -1)


def poolable(array: jax.Array, block_size: int, thresholds: tuple[float, ...]) -> jax.Array:
    """How many neighbours may be pooled in every block: the largest 2^n whose similarity is above thresholds[n - 1].

    The similarity for 2^n is `pair_similarity` at distance 2^n - 1; where none is high enough the number is 1.
    int32 `[batch, blocks, heads]`; array and block_size as there.
    """
    level = jnp.ones((), jnp.int32)
    for power, threshold in enumerate(thresholds, 1):
        is_alike = pair_similarity(array, block_size, 2**power - 1) > threshold
        level = jnp.where(is_alike, 2**power, level)
    return level
