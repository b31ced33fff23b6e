"""Choose: scores `[..., query_blocks, key_blocks]` -> bool masks of the same shape, or lists. -inf is never chosen."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sparse_attn.grammar.describe import split_blocks
from sparse_attn.sharding import over_auto_axes

_ELEMENTS_PER_STEP = 2**22  # bounds the scores of a step


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

    The entry that crosses the line is kept; entries without mass never are. A share of 1 keeps all others.

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
    is_short = (before < share * probability.sum(-1, keepdims=True)) | (share >= 1)  # rounding may end a sum early
    kept = jnp.take_along_axis(is_short, jnp.argsort(order, axis=-1), axis=-1)
    return forced | (kept & (probability > 0))


def bands(
    scores: jax.Array,
    ends: tuple[float, ...],
    *,
    rule: Literal["rank", "energy"],
    multiples: tuple[int, ...],
    least_first: int = 0,
) -> jax.Array:
    """Cuts the ranking of every row, best first, into bands that follow one another.

    The end of a band is, by "rank", the share `end` of the number of entries, rounded down; by "energy" one past the
    last rank up to which the sum of scores is at most `end` of the row's sum, or none if the best entry is above that.
    Then a band's length is rounded up to its multiple, or down where that reaches past the last entry.

    Args:
      scores: `[..., query_blocks, key_blocks]`, not negative.
      ends: where the bands end, as shares, not falling.
      rule: what the shares are of.
      multiples: of the lengths, one for each band.
      least_first: entries that the first band has at least.

    Returns:
      int32, shaped like scores: the number of an entry's band, len(ends) behind the last band.
    """
    size = scores.shape[-1]
    energy = jnp.cumsum(jnp.sort(scores, axis=-1, descending=True), axis=-1)
    place, band = rank(scores), jnp.zeros(scores.shape, jnp.int32)
    last = jnp.zeros((*scores.shape[:-1], 1), jnp.int32)
    for number, (end, multiple) in enumerate(zip(ends, multiples, strict=True)):
        if rule == "rank":
            wanted = jnp.full_like(last, int(size * end))
        else:
            within = (energy <= (end + 1e-6) * energy[..., -1:]).sum(-1, keepdims=True, dtype=jnp.int32)
            wanted = jnp.where(within > 0, within + 1, last)
        wanted = jnp.clip(jnp.maximum(wanted, least_first if number == 0 else 0), last, size)
        length = -(-(wanted - last) // multiple) * multiple
        last += jnp.where(last + length >= size, (size - last) // multiple * multiple, length)
        band += place >= last
    return band


def top_k_indices(scores: jax.Array, k: int) -> jax.Array:
    """The k best of every row as a list: int32 `[..., k]` by falling score, ties to the lower index, -1 behind."""

    def choose(scores: jax.Array) -> jax.Array:
        scores = jnp.where(scores == 0, 0, scores)  # lax.top_k would put 0 above -0
        best, indices = jax.lax.top_k(scores, min(k, scores.shape[-1]))
        indices = jnp.where(best == -jnp.inf, -1, indices)
        missing = k - indices.shape[-1]
        return jnp.pad(indices, ((0, 0),) * (indices.ndim - 1) + ((0, missing),), constant_values=-1)

    # XLA cannot split lax.top_k over devices by itself; of the rows all are independent.
    axes = "bk"[: scores.ndim - 1]
    return over_auto_axes(choose, (scores,), (axes,), axes, group=1)


def by_queries(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], *, first: int = 0, elements_per_query: int
) -> jax.Array:
    """`function(position, *arrays)` for a few queries at a time, so that only their scores are alive.

    Args:
      function: takes the places of t queries, int32 `[t]`, and arrays `[batch, t, ...]`; gives `[batch, t, ...]`. Also
        called with places and zeros behind the last query, where its result does not count.
      arrays: each `[batch, queries, ...]`.
      first: place of the first query.
      elements_per_query: size of the largest array that function makes for one query.

    Returns:
      What function gives, `[batch, queries, ...]`.
    """
    batch, num_queries = arrays[0].shape[:2]
    chunk = max(1, min(num_queries, _ELEMENTS_PER_STEP // elements_per_query))
    split = tuple(split_blocks(array, chunk).swapaxes(0, 1) for array in arrays)  # [steps, batch, chunk, ...]
    position = first + jnp.arange(split[0].shape[0] * chunk, dtype=jnp.int32).reshape(-1, chunk)
    result = jax.lax.map(lambda step: function(step[0], *step[1]), (position, split))
    return result.swapaxes(0, 1).reshape(batch, position.size, *result.shape[3:])[:, :num_queries]
