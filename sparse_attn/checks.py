"""Bad arguments are a ValueError at trace time that names the argument, its value and what is allowed (S10)."""

import math
import numbers

import jax
import jax.numpy as jnp


def check_positive(name: str, number: int) -> None:
    """A size or count: a Python integer of at least 1."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {name}={number!r}")


def check_not_negative(name: str, number: int) -> None:
    """A size or count that may be none: a Python integer of at least 0."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {name}={number!r}")


def check_integers(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    """An optional array of integers of the given shape."""
    if array is not None and (array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} must be integers of shape {shape}, got {array.dtype} of shape {array.shape}")


def check_arrays(query: jax.Array, key_values: dict[str, jax.Array]) -> None:
    """Ranks, dtypes and shapes that must agree between query and keys (or values)."""
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, queries, heads, head_dim], got query.shape={query.shape}")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query must be floating point, got query.dtype={query.dtype}")
    if 0 in query.shape:
        raise ValueError(f"query must not be empty, got query.shape={query.shape}")
    batch, _, num_heads, head_dim = query.shape
    for name, array in key_values.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must be [batch, keys, kv_heads, head_dim], got {name}.shape={array.shape}")
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {name}.dtype={array.dtype}")
        if 0 in array.shape or array.shape[0] != batch or array.shape[3] != head_dim or num_heads % array.shape[2]:
            raise ValueError(
                f"{name} must be [{batch}, keys, kv_heads, {head_dim}] with keys at least 1 and kv_heads a divisor of "
                f"query's {num_heads} heads, got {name}.shape={array.shape}"
            )


def check_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None) -> float:
    """The arrays of one attention call and its scale. Returns the factor of the logits: 1 / sqrt(head_dim) for None."""
    check_arrays(query, {"key": key, "value": value})
    if value.shape != key.shape:
        raise ValueError(f"value must be shaped like key {key.shape}, got value.shape={value.shape}")
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale must be None or a finite Python number, got scale={scale!r}")
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def check_self_attention(query: jax.Array, key: jax.Array) -> None:
    """The queries and keys of whole sequences: as many of the one as of the other."""
    check_arrays(query, {"key": key})
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key must have as many tokens as query, {query.shape[1]}, got key.shape={key.shape}")


def check_whole_blocks(query: jax.Array, key: jax.Array, block_size: int) -> None:
    """Keys that are longer than the queries, if at all, by whole blocks: then blocks of both lie on one grid."""
    if (key.shape[1] - query.shape[1]) % block_size or key.shape[1] < query.shape[1]:
        raise ValueError(f"key must be longer than query by whole blocks of {block_size}, got key.shape={key.shape}")
