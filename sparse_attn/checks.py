"""Bad arguments are a ValueError at trace time that names the argument, its value and what is allowed (S10)."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_attn.selection import BlockSelection

_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)))


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_ARRAYS = (
    *("query", "key", "value", "selection", "segment_ids", "seq_lengths", "query_seq_lengths"),
    *("key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids"),
)


def takes_no_batch(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorator: the function also takes arrays without a batch axis, `[tokens, heads, head_dim]`, and gives such."""
    run: Callable[..., Any] = function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = kwargs | dict(zip(names, args, strict=False))
        if any(np.ndim(given[name]) != 3 for name in ("query", "key", "value") if name in given):
            return run(*args, **kwargs)
        kwargs = given
        arrays = {name: kwargs[name] for name in _ARRAYS if kwargs.get(name) is not None}

        def add_axis(array: Any) -> Any:  # not converted: `check_integers` must see whether ids fit JAX's integers
            return (array if hasattr(array, "ndim") else np.asarray(array))[None]

        batched = jax.tree.map(add_axis, arrays, is_leaf=lambda array: isinstance(array, list | tuple))
        return jax.tree.map(lambda array: array[0], run(**(kwargs | batched)))

    return call


def check_positive(name: str, number: int) -> None:
    """A size or count: a Python integer of at least 1."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {name}={number!r}")


def check_not_negative(name: str, number: int) -> None:
    """A size or count that may be none: a Python integer of at least 0."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {name}={number!r}")


def check_share(name: str, number: float) -> None:
    """A share: a number from 0 to 1."""
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {name}={number!r}")


def check_one_of(name: str, given: Any, known: tuple[Any, ...]) -> None:
    """A mode: one of those that are known."""
    if given not in known:
        raise ValueError(f"{name} must be one of {known}, got {name}={given!r}")


class Sequences(NamedTuple):
    """The sequence arguments of a call, as far as they are given; arrays once `check_sequences` has seen them."""

    query_seq_lengths: Any = None  # [batch]
    key_value_seq_lengths: Any = None  # [batch]
    query_segment_ids: Any = None  # [batch, queries]
    key_value_segment_ids: Any = None  # [batch, keys]


WHOLE_ROWS = Sequences()


def check_integers(name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """An optional array of integers of the given shape; lists and NumPy arrays of numbers that fit are taken too."""
    if array is None:
        return None
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        if array.dtype.kind in "iu" and array.size:
            limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
            if array.min() < limits.min or array.max() > limits.max:
                raise ValueError(
                    f"{name} must lie between {limits.min} and {limits.max} unless jax_enable_x64 is set, got "
                    f"{array.min()} to {array.max()}"
                )
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    return jnp.asarray(array)


def check_sequences(
    query: jax.Array,
    key: jax.Array,
    given: Sequences,
    *,
    segment_ids: ArrayLike | None,
    seq_lengths: ArrayLike | None,
    is_causal: bool,
) -> Sequences:
    """The sequence arguments of a call as arrays; S5 says when key lengths alone are those of the queries too.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      given: those that tell queries from keys.
      segment_ids: `[batch, sequence]`, those of self-attention, instead of both.
      seq_lengths: `[batch]`, likewise.
      is_causal: as given to the call.
    """
    (batch, num_queries), num_keys = query.shape[:2], key.shape[1]
    for name, alone, sides in (("segment_ids", segment_ids, given[2:]), ("seq_lengths", seq_lengths, given[:2])):
        if alone is None:
            continue
        if sides != (None, None):
            raise ValueError(f"{name} must be given alone, or query_{name} and key_value_{name}")
        if num_queries != num_keys:
            raise ValueError(
                f"{name} are those of self-attention, got {num_queries} queries and {num_keys} keys: give "
                f"query_{name} and key_value_{name}"
            )
    if segment_ids is not None:
        given = given._replace(query_segment_ids=segment_ids, key_value_segment_ids=segment_ids)
    if seq_lengths is not None:
        given = given._replace(query_seq_lengths=seq_lengths, key_value_seq_lengths=seq_lengths)
    if (given.query_segment_ids is None) != (given.key_value_segment_ids is None):
        missing = "query_segment_ids" if given.query_segment_ids is None else "key_value_segment_ids"
        raise ValueError(f"{missing} is None: give query_segment_ids and key_value_segment_ids together, or neither")
    own = "seq_lengths" if seq_lengths is not None else None
    query_lengths = check_integers(own or "query_seq_lengths", given.query_seq_lengths, (batch,))
    key_lengths = check_integers(own or "key_value_seq_lengths", given.key_value_seq_lengths, (batch,))
    if query_lengths is None and is_causal and num_queries == num_keys:
        query_lengths = key_lengths
    own = "segment_ids" if segment_ids is not None else None
    return Sequences(
        query_lengths,
        key_lengths,
        check_integers(own or "query_segment_ids", given.query_segment_ids, (batch, num_queries)),
        check_integers(own or "key_value_segment_ids", given.key_value_segment_ids, (batch, num_keys)),
    )


def check_arrays(query: jax.Array, key_values: dict[str, jax.Array]) -> None:
    """Ranks, dtypes and shapes that must agree between query and keys (or values)."""
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, queries, heads, head_dim], got query.shape={query.shape}")
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must have a dtype of {', '.join(map(str, _DTYPES))}, got query.dtype={query.dtype}")
    if 0 in query.shape:
        raise ValueError(f"query must not be empty, got query.shape={query.shape}")
    batch, _, num_heads, head_dim = query.shape
    for name, array in key_values.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must be [batch, keys, kv_heads, head_dim], got {name}.shape={array.shape}")
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {name}.dtype={array.dtype}")
        own_size = name != "value" and array.shape[3] != head_dim
        if 0 in array.shape or array.shape[0] != batch or own_size or num_heads % array.shape[2]:
            size = "value_head_dim" if name == "value" else head_dim
            raise ValueError(
                f"{name} must be [{batch}, keys, kv_heads, {size}] with keys at least 1 and kv_heads a divisor of "
                f"query's {num_heads} heads, got {name}.shape={array.shape}"
            )


def check_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None, *, own_head_dim: bool = False
) -> float:
    """The arrays of one attention call and its scale. Returns the factor of the logits: 1 / sqrt(head_dim) for None.

    With own_head_dim the head_dim of value may differ from key's.
    """
    check_arrays(query, {"key": key, "value": value})
    if value.shape[:3] != key.shape[:3] or (value.shape != key.shape and not own_head_dim):
        aside = ", its head_dim aside" if own_head_dim else ""
        raise ValueError(f"value must be shaped like key {key.shape}{aside}, got value.shape={value.shape}")
    check_scale(scale)
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def check_selection(selection: BlockSelection, query: jax.Array) -> jax.Array:
    """A choice for these queries; its indices as an array `[batch, heads, queries, top_k]`."""
    indices, shape = jnp.asarray(selection.indices), (query.shape[0], query.shape[2], query.shape[1])
    check_positive("selection.block_size", selection.block_size)
    is_integer = jnp.issubdtype(indices.dtype, jnp.integer)
    if indices.ndim != 4 or indices.shape[:3] != shape or 0 in indices.shape or not is_integer:
        raise ValueError(
            f"selection.indices must be integers of shape (batch, heads, queries, top_k) = "
            f"({', '.join(map(str, shape))}, at least 1), got {indices.dtype} of shape {indices.shape}"
        )
    return indices


def check_scale(scale: float | None) -> None:
    """The factor of the logits, where one is given."""
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale must be None or a finite Python number, got scale={scale!r}")


def check_self_attention(query: jax.Array, key: jax.Array) -> None:
    """The queries and keys of whole sequences: as many of the one as of the other."""
    check_arrays(query, {"key": key})
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key must have as many tokens as query, {query.shape[1]}, got key.shape={key.shape}")


def check_whole_blocks(query: jax.Array, key: jax.Array, block_size: int) -> None:
    """Keys that are longer than the queries, if at all, by whole blocks: then blocks of both lie on one grid."""
    if (key.shape[1] - query.shape[1]) % block_size or key.shape[1] < query.shape[1]:
        raise ValueError(f"key must be longer than query by whole blocks of {block_size}, got key.shape={key.shape}")
