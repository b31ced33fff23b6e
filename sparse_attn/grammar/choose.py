"""Choose: scores `[..., query_blocks, key_blocks]` -> bool masks of the same shape. -inf is never chosen."""

import jax
import jax.numpy as jnp


def rank(scores: jax.Array) -> jax.Array:
    """Place of every entry among its row by falling score, int32 from 0; ties go to the lower index."""
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def top_k(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k best of every row (all that can be chosen, if fewer).

    Args:
      scores: `[..., query_blocks, key_blocks]`.
      k: a number, or an int array that broadcasts to `[..., query_blocks, 1]`.
    """
    return (rank(scores) < k) & (scores > -jnp.inf)


def top_p(probability: jax.Array, share: float | jax.Array, first: jax.Array | None = None) -> jax.Array:
    """The shortest prefix of every row, by falling probability, whose mass reaches `share` of the row's mass.

    The entry that crosses the line is kept; entries without mass never are.

    Args:
      probability: `[..., query_blocks, key_blocks]`, not negative; rows need not add up to 1.
      share: between 0 and 1; an array broadcasts to `[..., query_blocks, 1]`.
      first: bool, broadcasts to probability: forced entries that are taken before all others and whose mass counts
        (is *credited*). To force entries without credit, join them to the result with `|` instead.

    Returns:
      bool, shaped like probability; entries of `first` are always chosen.
    """
    forced = jnp.zeros_like(probability, bool) if first is None else jnp.broadcast_to(first, probability.shape)
    order = jnp.argsort(jnp.where(forced, jnp.inf, probability), axis=-1, descending=True, stable=True)
    sorted_mass = jnp.take_along_axis(probability, order, axis=-1)
    before = jnp.cumsum(sorted_mass, axis=-1) - sorted_mass
    is_short = before < share * probability.sum(-1, keepdims=True)
    kept = jnp.take_along_axis(is_short, jnp.argsort(order, axis=-1), axis=-1)
    return forced | (kept & (probability > 0))
