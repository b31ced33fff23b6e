"""Small pieces that the Triton kernels share: sizes, rows of an array in memory, products.

Triton demands tiles whose sizes are powers of two. An array in memory keeps its own sizes; a tile is as large as the
next power of two, and what it has too much is neither read nor written: every access carries a mask.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

plgpu: Any = None  # stays None where JAX has no Triton any more, whose end it has announced
with contextlib.suppress(ImportError):
    from jax.experimental.pallas import triton

    plgpu = triton

# The smallest side of a matrix product, a limit of the tensor cores.
SMALLEST_SIDE = 16
LARGEST_HEAD_DIM = 256


def refuses(query: jax.Array) -> str | None:
    """Why the kernels cannot take such queries; None if they can."""
    if plgpu is None:
        return f"jax {jax.__version__} has no Triton backend of Pallas"
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernels take float32, bfloat16 and float16, got query.dtype={query.dtype}"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return (
            f"the GPU kernels take head_dim up to {LARGEST_HEAD_DIM}, for a row must fit the registers, got "
            f"head_dim={query.shape[-1]}"
        )
    return None


def divide(number: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient, rounded down, and remainder of int32 numbers not negative."""
    return lax.div(number, jnp.int32(divisor)), lax.rem(number, jnp.int32(divisor))


def ceil_div(number: Any, divisor: int) -> Any:
    """Quotient of Python integers or int32 numbers not negative, rounded up."""
    return -(-number // divisor) if isinstance(number, int) else divide(number + (divisor - 1), divisor)[0]


def loop(begin: Any, end: Any, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` that counts in int32 even where 64-bit types are switched on."""
    return lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return 1 << (max(number, least) - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile of queries, keys or values."""
    return power_of_two(head_dim, SMALLEST_SIDE)


def iota(size: int) -> jax.Array:
    """int32 `[size]`: 0, 1, 2, ..."""
    return lax.iota(jnp.int32, size)


def load_rows(ref: Any, row: jax.Array, is_real: jax.Array, columns: int, first_column: int = 0) -> jax.Array:
    """Rows of `[rows, width]`, zeros where `is_real` is false and behind the last column: `[..., columns]`.

    Args:
      ref: the array in memory.
      row: int32 `[...]`, numbers of the rows.
      is_real: bool, shaped like row.
      columns: how many of them.
      first_column: number of the first.
    """
    index, mask = _places(ref, row, is_real, columns, first_column)
    return plgpu.load(ref.at[index], mask=mask, other=0)


def store_rows(ref: Any, row: jax.Array, is_real: jax.Array, tile: jax.Array) -> None:
    """Writes what `load_rows` would read, in the array's dtype. The rows where `is_real` holds are different ones."""
    index, mask = _places(ref, row, is_real, tile.shape[-1], first_column=0)
    plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=mask)


def _places(
    ref: Any, row: jax.Array, is_real: jax.Array, columns: int, first_column: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    shape = (*row.shape, columns)
    column = first_column + lax.broadcasted_iota(jnp.int32, shape, row.ndim)
    mask = jnp.broadcast_to(is_real[..., None], shape)
    if first_column + columns > ref.shape[-1]:
        mask &= column < ref.shape[-1]
    return (jnp.broadcast_to(row[..., None], shape), column), mask


def load_numbers(ref: Any, place: jax.Array, is_real: jax.Array, other: float = 0) -> jax.Array:
    """Entries of a one-dimensional array, `other` where `is_real` is false; shaped like place."""
    return plgpu.load(ref.at[place], mask=is_real, other=other)


def store_numbers(ref: Any, place: jax.Array, is_real: jax.Array, numbers: jax.Array) -> None:
    """Writes what `load_numbers` would read."""
    plgpu.store(ref.at[place], numbers.astype(ref.dtype), mask=is_real)
