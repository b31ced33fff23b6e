"""Loops over heads whose lengths are known at run time only, taking several heads at a time where that pays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def at_most(size: int, bound: int) -> int:
    """min(size, bound), or size where bound is symbolic (`jax.export.symbolic_shape`) and may be either."""
    return min(size, bound) if isinstance(bound, int) else size


def at_least(size: int, bound: int) -> int:
    """max(size, bound), or size where bound is symbolic and may be either."""
    return max(size, bound) if isinstance(bound, int) else size


def heads_per_step(num_heads: int, elements_per_head: int, elements: int) -> int:
    """How many heads to take at a time.

    Args:
      num_heads: how many there are; if symbolic, they are taken one by one.
      elements_per_head: of a head's largest array.
      elements: of a step's largest array.
    """
    if not isinstance(num_heads, int) or not isinstance(elements_per_head, int):
        return 1
    return max(1, min(num_heads, elements // elements_per_head))


def divisor(number: int, bound: int) -> int:
    """The largest divisor of number that is at most bound, 1 if bound is smaller: so many at a time leave no rest."""
    return next((size for size in range(min(number, bound), 0, -1) if number % size == 0), 1)


def for_each(steps: int | jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """`jax.lax.fori_loop` from 0 to steps, without a loop for one step."""
    if isinstance(steps, int) and steps == 1:
        return body(jnp.int32(0), carry)
    return jax.lax.fori_loop(0, steps, body, carry)


def map_heads(function: Callable[..., Any], inputs: tuple, heads: int) -> Any:
    """`function(*inputs)` for every entry along the leading axis of inputs, `heads` entries at a time."""
    num_heads = jax.tree.leaves(inputs)[0].shape[0]
    if isinstance(num_heads, int) and heads >= num_heads:
        return jax.vmap(function)(*inputs)
    return jax.lax.map(lambda entry: function(*entry), inputs, batch_size=heads if heads > 1 else None)


@jax.custom_batching.custom_vmap
def loop_bound(bound: jax.Array) -> jax.Array:
    """The bound itself; under vmap the largest of the batch.

    A loop whose bound differs over a batch would run to the largest and copy its whole state at every step to keep the
    finished entries as they were. With one bound it just runs; its steps past an entry's own end must change nothing.
    """
    return bound


@loop_bound.def_vmap
def _largest(axis_size: int, in_batched: list[bool], bound: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return loop_bound(bound.max()), False
