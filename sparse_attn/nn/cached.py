"""Decoding in the style of Flax: a module that keeps its cache itself."""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike


class Cached(nnx.Module):
    """A module that decodes, called as layer(x) one call after another; the cache is an `nnx.Cache` variable.

    `nnx.jit(Cached.__call__, donate_argnames="self")` updates the cache in place.

    Args:
      module: with `init_cache` and a call that takes and returns a cache: `SelfAttention`, `Transformer`.
      batch_size, max_length, max_draft: as in `SelfAttention.init_cache`.
    """

    def __init__(self, module: Any, batch_size: int, max_length: int, *, max_draft: int = 0):
        self.module = module
        self.cache = nnx.Cache(module.init_cache(batch_size, max_length, max_draft=max_draft))

    def __call__(self, inputs: jax.Array, *, num_new: ArrayLike | None = None) -> jax.Array:
        """What the module gives for the next tokens of each row, and remembers them."""
        output, cache = self.module(inputs, cache=self.cache.get_value(), num_new=num_new)
        self.cache.set_value(cache)
        return output
