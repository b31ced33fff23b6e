"""What the three caches share: how long every row is, what it may still grow to, and raw keys for the convolution."""

import dataclasses
from typing import Any, ClassVar, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_attn.checks import check_arrays, check_integers, check_not_negative, check_positive
from sparse_attn.keys import causal_key_convolution

_Cache = TypeVar("_Cache", bound="Cache")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The keys and values of one layer, a pytree that may be donated. How they lie is the matter of each kind.

    Attributes:
      key: after the convolution, `[..., head_dim]`.
      value: `[..., value_head_dim]`.
      length: int32 `[batch]`, tokens of each row.
      written: int32 `[batch]`, the largest length since the row was empty: a ring holds the last tokens before it.
      raw_key: `[batch, ring, kv_heads, head_dim]`, keys before the convolution; that of token p stands at p % ring, for
        ring = key_conv_width - 1 + max_draft. Empty where a convolution looks at no earlier key.
      max_length: tokens that a row can hold.
      key_conv_width: tokens that the key convolution spans, 0 for none.
      max_draft: tokens that a ring can give back.
    """

    key_axes: ClassVar[str] = "b.k"  # of key and value, as words, see `sparse_attn.sharding`

    key: jax.Array
    value: jax.Array
    length: jax.Array
    written: jax.Array
    raw_key: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})
    key_conv_width: int = dataclasses.field(metadata={"static": True})
    max_draft: int = dataclasses.field(metadata={"static": True})

    @property
    def forgets(self) -> bool:
        """Whether a part of it is a ring, in which new tokens overwrite old ones."""
        return self.raw_key.shape[1] > 0

    def axes(self: _Cache) -> _Cache:
        """The axes of the arrays as words."""
        words: Any = jax.tree.map(lambda _: self.key_axes, self)
        return dataclasses.replace(words, length="b", written="b", raw_key="b.k")


class CacheOptions(TypedDict, total=False):
    """What the `init_..._cache` take besides sizes, as `init_moba_cache`, which has the defaults."""

    value_head_dim: int | None
    key_conv_width: int
    max_draft: int
    dtype: jax.typing.DTypeLike


def empty_fields(
    shape: tuple[int, ...],
    batch_size: int,
    max_length: int,
    num_key_value_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    key_conv_width: int = 0,
    max_draft: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """The fields of `Cache` for rows without tokens, once the sizes are checked; shape is that of key but head_dim."""
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    sizes = {"batch_size": batch_size, "max_length": max_length, "num_key_value_heads": num_key_value_heads}
    for name, size in (sizes | {"head_dim": head_dim, "value_head_dim": value_head_dim}).items():
        check_positive(name, size)
    check_not_negative("key_conv_width", key_conv_width)
    check_not_negative("max_draft", max_draft)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got dtype={dtype}")
    ring = key_conv_width - 1 + max_draft if key_conv_width > 1 else 0
    return {
        "key": jnp.zeros((*shape, head_dim), dtype),
        "value": jnp.zeros((*shape, value_head_dim), dtype),
        "length": jnp.zeros(batch_size, jnp.int32),
        "written": jnp.zeros(batch_size, jnp.int32),
        "raw_key": jnp.zeros((batch_size, ring, num_key_value_heads, head_dim), dtype),
        "max_length": int(max_length),
        "key_conv_width": int(key_conv_width),
        "max_draft": int(max_draft),
    }


def check_query(query: jax.Array, key: jax.Array) -> None:
    """Queries against one token of the cache's keys, `[batch, kv_heads, head_dim]`."""
    check_arrays(query, {})
    batch, kv_heads, head_dim = key.shape
    if (query.shape[0], query.shape[3]) != (batch, head_dim) or query.shape[2] % kv_heads:
        raise ValueError(
            f"query must be [{batch}, tokens, heads, {head_dim}] with heads a multiple of the cache's {kv_heads}, got "
            f"query.shape={query.shape}"
        )
    if query.dtype != key.dtype:
        raise ValueError(f"query must have the cache's dtype {key.dtype}, got query.dtype={query.dtype}")


def count_new(num_new: ArrayLike | None, query: jax.Array) -> jax.Array:
    """Real tokens of each row among those of query (or key), int32 `[batch]`; None: all. Clipped to what is given."""
    batch_size, num_tokens = query.shape[:2]
    array = check_integers("num_new", num_new, (batch_size,))
    if array is None:
        return jnp.full(batch_size, num_tokens, jnp.int32)
    return jnp.clip(array.astype(jnp.int32), 0, num_tokens)


def append(
    cache: _Cache, key: jax.Array, key_conv_kernel: jax.Array | None, num_new: jax.Array
) -> tuple[_Cache, jax.Array]:
    """Everything that all kinds do for new tokens, but for writing the keys and values.

    Args:
      cache: before the tokens.
      key: `[batch, tokens, kv_heads, head_dim]`, raw.
      key_conv_kernel: `[width, kv_heads, head_dim]`, where the cache has a convolution.
      num_new: int32 `[batch]`.

    Returns:
      The cache with the lengths and the raw keys after the tokens, and the keys after the convolution, shaped like key.
    """
    length = cache.length + num_new
    raw_key, new_key = cache.raw_key, key
    if key_conv_kernel is not None:
        lookback = cache.key_conv_width - 1
        earlier = take_ring(raw_key, cache.length, lookback)  # [batch, lookback, kv_heads, head_dim]
        new_key = causal_key_convolution(jnp.concatenate([earlier, key], axis=1), key_conv_kernel)[:, lookback:]
        raw_key = write_ring(raw_key, key, cache.length, num_new)
    written = jnp.maximum(cache.written, length)
    return dataclasses.replace(cache, length=length, written=written, raw_key=raw_key), new_key


def prepare_new(
    cache: Cache,
    key: jax.Array,
    value: jax.Array,
    key_conv_kernel: jax.Array | None,
    num_new: ArrayLike | None,
    like: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Checks new tokens; `like` are one token's keys and values in the cache. Returns num_new as an array."""
    for name, array, slot in (("key", key, like[0]), ("value", value, like[1])):
        batch, *rest = slot.shape
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != slot.shape or array.shape[1] == 0:
            shape = ", ".join(map(str, (batch, "tokens", *rest)))
            raise ValueError(f"{name} must be [{shape}] with tokens at least 1, got {name}.shape={array.shape}")
        if array.dtype != slot.dtype:
            raise ValueError(f"{name} must have the cache's dtype {slot.dtype}, got {name}.dtype={array.dtype}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"value must have as many tokens as key, {key.shape[1]}, got value.shape={value.shape}")
    width = 0 if key_conv_kernel is None else key_conv_kernel.shape[0]
    if width != cache.key_conv_width:
        raise ValueError(f"key_conv_kernel must have the cache's width {cache.key_conv_width}, got {width}")
    counts = count_new(num_new, key)
    length = cache.length + counts
    _check(length <= cache.max_length, f"a row holds at most max_length={cache.max_length} tokens", length)
    return counts


def take_ring(ring: jax.Array, length: jax.Array, count: int) -> jax.Array:
    """The last `count` tokens before `length` `[batch]` of `[batch, ring, ...]`, oldest first; zeros before the row."""
    if count == 0:
        return ring[:, :0]
    position = length[:, None] - count + jnp.arange(count)  # [batch, count]
    tokens = jax.vmap(lambda ring, place: ring[place])(ring, position % ring.shape[1])
    return jnp.where((position >= 0).reshape(*position.shape, *(1,) * (ring.ndim - 2)), tokens, 0)


def write_ring(ring: jax.Array, new: jax.Array, length: jax.Array, num_new: jax.Array) -> jax.Array:
    """`[batch, ring, ...]` with the last of the first num_new `[batch]` tokens of `[batch, tokens, ...]` written."""
    size = ring.shape[1]
    if size == 0:
        return ring
    token = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    is_kept = (token < num_new[:, None]) & (token >= num_new[:, None] - size)
    place = jnp.where(is_kept, (length[:, None] + token) % size, size)  # [batch, tokens]
    write = jax.vmap(lambda ring, place, new: ring.at[place].set(new, mode="drop", unique_indices=True))
    return write(ring, place, new)


def rollback(cache: _Cache, length: ArrayLike) -> _Cache:
    """Takes the last tokens of every row back: rows of `length` tokens again, as if the others had never come.

    Nothing is computed; later tokens overwrite what is taken back, which must be finite, for until then attention
    weighs it with 0. A MoBA or dense cache without a key convolution can go back to any length. In a ring (raw keys of
    a convolution, a window) new tokens overwrite old ones: there a row can go back by max_draft tokens from the
    greatest length that it has had, or to 0.

    Args:
      cache: of any kind.
      length: int `[batch]`, from 0 to the cache's.

    Returns:
      The shorter cache.

    Raises:
      ValueError: a length is out of bounds. Inside jit, where the numbers are not known, the row is lost: its length
        becomes max_length + 1, and what it attends from there on is NaN.
    """
    given = check_integers("length", length, cache.length.shape)
    assert given is not None
    given = given.astype(jnp.int32)
    is_right = (given >= 0) & (given <= cache.length)
    _check(is_right, "length must lie between 0 and the cache's", given)
    if cache.forgets:
        is_kept = (given == 0) | (given >= cache.written - cache.max_draft)
        _check(is_kept, f"a row can go back by max_draft={cache.max_draft} tokens or to 0", given)
        is_right &= is_kept
    written = jnp.where(given == 0, 0, cache.written)
    return dataclasses.replace(cache, length=jnp.where(is_right, given, cache.max_length + 1), written=written)


def _check(is_right: jax.Array, rule: str, length: jax.Array) -> None:
    """ValueError where the numbers are known."""
    if not isinstance(is_right, jax.core.Tracer) and not is_right.all():
        raise ValueError(f"{rule}, got {np.asarray(length).tolist()}")


def mark_lost(output: jax.Array, length: jax.Array, num_new: jax.Array, max_length: int) -> jax.Array:
    """The output `[batch, tokens, heads, value_head_dim]`, NaN for tokens that found no room.

    By a sum, which `checkify.nan_checks` look at.
    """
    token = jnp.arange(output.shape[1])
    is_lost = (token < num_new[:, None]) & ((length - num_new)[:, None] + token >= max_length)  # [batch, tokens]
    return output + jnp.where(is_lost, jnp.nan, 0)[:, :, None, None].astype(output.dtype)
