"""Loops over heads whose lengths are known at run time only, taking several heads at a time where that pays."""

from collections.abc import Callable
from typing import Any

import jax

# Elements of a step's largest array. On a CPU a step should stay near the cache, elsewhere it should fill the machine.
_ELEMENTS_PER_STEP = {"cpu": 2**20}
_ELEMENTS_PER_STEP_ELSEWHERE = 2**26


def heads_per_step(num_heads: int, elements_per_head: int) -> int:
    """How many heads to take at a time, when a head's largest array has `elements_per_head` elements."""
    elements = _ELEMENTS_PER_STEP.get(jax.default_backend(), _ELEMENTS_PER_STEP_ELSEWHERE)
    return max(1, min(num_heads, elements // elements_per_head))


def map_heads(function: Callable[..., Any], inputs: tuple, heads: int) -> Any:
    """`function(*inputs)` for every entry along the leading axis of inputs, `heads` entries at a time."""
    num_heads = jax.tree.leaves(inputs)[0].shape[0]
    if heads >= num_heads:
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
