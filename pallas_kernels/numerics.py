"""Constants, products and the types of results, as all kernels share them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# The logit of a key out of sight. Finite, so that differences are; no real logit comes near it.
OUT_OF_SIGHT = -0.7 * float(jnp.finfo(jnp.float32).max)

NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a b^T
TN = (((0,), (0,)), ((), ()))  # a^T b


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result: it varies over the mesh axes of a `jax.shard_map` over which `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def product(left: jax.Array, right: jax.Array, dimensions: Any) -> jax.Array:
    """Matrix product added up in float32; float32 operands at full precision, not rounded to bfloat16 or TF32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
