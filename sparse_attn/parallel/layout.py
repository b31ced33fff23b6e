"""Which tokens of a sequence lie on which shard.

A sequence of N tokens is split into P equal shards, one for each place along a mesh axis. Either the shards are cut
from it as they follow one another, or the sequence is dealt out in stripes, as cards are:

    tokens           0 1 2 3 4 5 6 7     on 2 shards
    contiguous       0 1 2 3 | 4 5 6 7
    stripes of 2     0 1 4 5 | 2 3 6 7

Under causal routing the shards of the contiguous layout are loaded unevenly, since early keys are seen by most queries.
Stripes of a few blocks even that out.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_positive


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a sequence lies on the shards.

    Attributes:
      stripe: None for contiguous shards. Else tokens of a stripe, for MoBA a multiple of block_size ("block-cyclic");
        stripe s lies on shard s % P, at place s // P there.
    """

    stripe: int | None = None

    def __post_init__(self) -> None:
        if self.stripe is not None:
            check_positive("stripe", self.stripe)

    def stripe_of(self, local_tokens: int, where: str = "") -> int:
        """Tokens of a stripe on shards of so many tokens; a contiguous shard is one stripe. `where` is for the error.

        Raises:
          ValueError: a shard does not hold whole stripes.
        """
        stripe = local_tokens if self.stripe is None else self.stripe
        if local_tokens % stripe:
            raise ValueError(f"stripes of {stripe} tokens must divide the {local_tokens} tokens of a shard{where}")
        return stripe

    def positions(self, shard: jax.Array | int, local_tokens: int, num_shards: int) -> jax.Array:
        """Positions of a shard's tokens in the sequence, rising, int32 `[local_tokens]`."""
        stripe, place = self.stripe_of(local_tokens), jnp.arange(local_tokens, dtype=jnp.int32)
        return (place // stripe * num_shards + shard) * stripe + place % stripe

    def shard_of(self, position: jax.Array, local_tokens: int, num_shards: int) -> jax.Array:
        """The shard that holds the token at each position, int32, shaped like it."""
        return position // self.stripe_of(local_tokens) % num_shards

    def of_neighbours(self, number: int) -> "Layout":
        """The layout of shards that are made of `number` neighbouring shards each, their tokens in order."""
        return self if self.stripe is None else Layout(self.stripe * number)


CONTIGUOUS = Layout()


def shard_sequence(array: jax.Array, *, num_shards: int, layout: Layout, axis: int = 1) -> jax.Array:
    """Reorders a sequence so that equal parts of the result are the shards of a layout.

    Split the result over the mesh axis with `PartitionSpec`. A permutation; the contiguous layout changes nothing.

    Args:
      array: of any shape and dtype, tokens in order along `axis`.
      num_shards: size of the mesh axis that will split the sequence.
      layout: of the shards.
      axis: the axis of the sequence.

    Returns:
      Array of the same shape and dtype.

    Raises:
      ValueError: the sequence is no whole number of shards, or a shard no whole number of stripes.
    """
    return _permute(array, num_shards, layout, axis, lambda shards, stripes: (stripes, shards))


def unshard_sequence(array: jax.Array, *, num_shards: int, layout: Layout, axis: int = 1) -> jax.Array:
    """Undoes `shard_sequence`; arguments, result and errors are the same."""
    return _permute(array, num_shards, layout, axis, lambda shards, stripes: (shards, stripes))


def _permute(
    array: jax.Array, num_shards: int, layout: Layout, axis: int, order: Callable[[int, int], tuple[int, int]]
) -> jax.Array:
    check_positive("num_shards", num_shards)
    array = jnp.asarray(array)
    num_tokens = array.shape[axis]
    if num_tokens % num_shards:
        raise ValueError(f"num_shards={num_shards} must divide the sequence, got {num_tokens} tokens on axis {axis}")
    stripe = layout.stripe_of(num_tokens // num_shards)
    axis %= array.ndim
    outer = order(num_shards, num_tokens // num_shards // stripe)
    stripes = array.reshape(*array.shape[:axis], *outer, stripe, *array.shape[axis + 1 :])
    return stripes.swapaxes(axis, axis + 1).reshape(array.shape)
