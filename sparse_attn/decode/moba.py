"""MoBA with a cache, exactly: prefill, chunks, single steps and drafts choose and give what `moba_attention` does.

The law: however a row is cut into calls, every query's choice and output are those of the causal `moba_attention` over
the whole row. A query's own block is chosen without a score (S2), so only completed blocks need a mean. It is computed
from the cached keys when the block completes: nothing drifts, and to take tokens back is to lower the length.

A step must read, for each row and key/value head with g query heads, of the L tokens so far,

    4 head_dim L / block_size                                 bytes of means, float32
    U block_size (head_dim + value_head_dim) itemsize         bytes of chosen blocks, U <= g (top_k - 1) + 1

against L (head_dim + value_head_dim) itemsize of dense attention. Nothing here is differentiable.
"""

import dataclasses
import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import Blocks
from sparse_attn.attend import cached, derivatives, route
from sparse_attn.attend.backends import Implementation, resolve
from sparse_attn.attention import once_each, raise_refusal
from sparse_attn.checks import check_positive, check_scale, check_selection
from sparse_attn.decode.cache import Cache, append, check_query, count_new, empty_fields, mark_lost, prepare_new
from sparse_attn.layout import zero_padding
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import over_auto_axes, over_explicit_axes, vary_alike

_TABLE_ROWS = 64  # queries times heads of a group whose scores may all stand in one table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBACache(Cache):
    """The cache of one MoBA layer; others of its attributes stand in `Cache`.

    Attributes:
      key: `[batch, kv_heads, blocks, block_size, head_dim]`, after the convolution.
      value: `[batch, kv_heads, blocks, block_size, value_head_dim]`.
      mean: float32 (float64 for float64) `[batch, kv_heads, blocks, head_dim]`, the mean key of each of the first
        length // block_size blocks.
    """

    key_axes = "bk"

    mean: jax.Array

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.key.shape[3]

    @property
    def num_blocks(self) -> int:
        """Blocks of a full row."""
        return self.key.shape[2]


def init_moba_cache(
    batch_size: int,
    max_length: int,
    num_key_value_heads: int,
    head_dim: int,
    *,
    block_size: int,
    value_head_dim: int | None = None,
    key_conv_width: int = 0,
    max_draft: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> MoBACache:
    """A cache without tokens.

    Args:
      batch_size: rows.
      max_length: tokens that a row can hold; memory is taken for all of them.
      num_key_value_heads: heads of keys and values.
      head_dim: of keys.
      block_size: keys in a block.
      value_head_dim: of values; None: head_dim.
      key_conv_width: tokens that the key convolution spans, the current one included; 0 for none.
      max_draft: tokens that `rollback` can take back where there is a convolution; without one, any number.
      dtype: of keys, values and queries.

    Raises:
      ValueError: an argument has a wrong value.
    """
    check_positive("block_size", block_size)
    shape = (batch_size, num_key_value_heads, -(-max_length // block_size))
    fields = empty_fields(
        (*shape, block_size),
        batch_size,
        max_length,
        num_key_value_heads,
        head_dim,
        value_head_dim=value_head_dim,
        key_conv_width=key_conv_width,
        max_draft=max_draft,
        dtype=dtype,
    )
    return MoBACache(mean=jnp.zeros((*shape, head_dim), jnp.promote_types(dtype, jnp.float32)), **fields)


def extend_moba_cache(
    cache: MoBACache,
    key: jax.Array,
    value: jax.Array,
    *,
    key_conv_kernel: jax.Array | None = None,
    num_new: ArrayLike | None = None,
) -> MoBACache:
    """The cache with new tokens behind those that it holds; donate the old one, and nothing of its size is copied.

    Inside jit, where lengths are not known, a token that finds no room raises nothing: it is not stored, overwrites
    nothing, and is counted by `length`; attention gives NaN for it, which `jax.experimental.checkify` (nan_checks) and
    `jax_debug_nans` report.

    Args:
      cache: the tokens so far.
      key: `[batch, tokens, kv_heads, head_dim]`, of the cache's dtype, before the convolution.
      value: `[batch, tokens, kv_heads, value_head_dim]`, of the cache's dtype.
      key_conv_kernel: `[width, kv_heads, head_dim]`, as in `causal_key_convolution`, for a cache with a key_conv_width.
      num_new: int `[batch]`, how many of the tokens are real, clipped to 0..tokens; the first ones are. None: all.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; outside jit, a row would grow beyond max_length.
    """
    key, value = map(jnp.asarray, (key, value))
    num_new = prepare_new(cache, key, value, key_conv_kernel, num_new, (cache.key[:, :, 0, 0], cache.value[:, :, 0, 0]))

    def extend(
        key: jax.Array, value: jax.Array, cache: MoBACache, kernel: jax.Array | None, num_new: jax.Array
    ) -> MoBACache:
        extended, key = append(cache, key, kernel, num_new)
        position = cache.length[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)  # [batch, tokens]
        is_stored = (position < extended.length[:, None]) & (position < cache.max_length)
        position = jnp.where(is_stored, position, cache.num_blocks * cache.block_size)  # the latter are dropped
        new_key, new_value = _write(cache.key, key, position), _write(cache.value, value, position)
        mean = _complete(cache.mean, new_key, cache.length, extended.length, key.shape[1])
        return dataclasses.replace(extended, key=new_key, value=new_value, mean=mean)

    operands, axes = (key, value, cache, key_conv_kernel, num_new), ("b.k", "b.k", cache.axes(), ".k", "b")
    return over_explicit_axes(extend, operands, axes, cache.axes())


def _write(blocks: jax.Array, tokens: jax.Array, position: jax.Array) -> jax.Array:
    """`[batch, kv_heads, blocks, block_size, x]` with `[batch, tokens, kv_heads, x]` at positions `[batch, tokens]`."""
    block, place = jnp.divmod(position, blocks.shape[3])

    def write_head(blocks: jax.Array, tokens: jax.Array, block: jax.Array, place: jax.Array) -> jax.Array:
        return blocks.at[block, place].set(tokens, mode="drop", unique_indices=True)

    write_row = jax.vmap(write_head, (0, 1, None, None))
    return jax.vmap(write_row)(blocks, tokens, block, place)


def _complete(mean: jax.Array, key: jax.Array, start: jax.Array, stop: jax.Array, num_tokens: int) -> jax.Array:
    """The means `[batch, kv_heads, blocks, head_dim]`, with those of the blocks that end in start..stop `[batch]`."""
    num_blocks, block_size = key.shape[2:4]
    ended = -(-num_tokens // block_size)  # at most so many
    block = (start // block_size)[:, None] + jnp.arange(ended, dtype=jnp.int32)  # [batch, ended]
    block = jnp.where(block < (stop // block_size)[:, None], block, num_blocks)  # the latter are dropped

    def complete_head(mean: jax.Array, key: jax.Array, block: jax.Array) -> jax.Array:
        keys = key.at[block].get(mode="clip").astype(mean.dtype)  # [ended, block_size, head_dim]
        return mean.at[block].set(keys.sum(1) / block_size, mode="drop", unique_indices=True)

    def complete(mean: jax.Array, key: jax.Array, block: jax.Array) -> jax.Array:
        complete = jax.vmap(jax.vmap(complete_head, (0, 0, None)))
        return jax.lax.cond((block < num_blocks).any(), complete, lambda mean, key, block: mean, mean, key, block)

    operands = vary_alike((mean, key, block))
    return over_auto_axes(complete, operands, ("bk", "bk", "b"), "bk", group=1)


@overload
def moba_cached_attention(
    query: jax.Array,
    cache: MoBACache,
    *,
    top_k: int,
    num_new: ArrayLike | None = None,
    scale: float | None = None,
    selection: BlockSelection | None = None,
    return_selection: Literal[False] = False,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def moba_cached_attention(
    query: jax.Array,
    cache: MoBACache,
    *,
    top_k: int,
    num_new: ArrayLike | None = None,
    scale: float | None = None,
    selection: BlockSelection | None = None,
    return_selection: Literal[True],
    implementation: Implementation | None = None,
) -> tuple[jax.Array, BlockSelection]: ...


def moba_cached_attention(
    query: jax.Array,
    cache: MoBACache,
    *,
    top_k: int,
    num_new: ArrayLike | None = None,
    scale: float | None = None,
    selection: BlockSelection | None = None,
    return_selection: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, BlockSelection]:
    """MoBA attention of the last tokens of every row, those that `extend_moba_cache` has just added, to the whole row.

    Few queries read the means and their chosen blocks alone; many are sorted by block, as in `moba_attention`. Shapes
    decide, and the backend (`cached_rows` of `sparse_attn.attend.backends.Xla`).

    Args:
      query: `[batch, tokens, heads, head_dim]`, of the cache's dtype; heads is a multiple of kv_heads. Query t of a row
        stands at position length - num_new + t.
      cache: with the keys and values of these tokens.
      top_k: blocks that a query attends, the own block included, at least 1.
      num_new: int `[batch]`, as in `extend_moba_cache`.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      selection: blocks to attend instead of the router's choice, for these queries.
      return_selection: whether to return the choice too.
      implementation: as in `moba_attention`.

    Returns:
      Array `[batch, tokens, heads, value_head_dim]` of query's dtype: zeros behind the real tokens, NaN for a token
      that found no room. With return_selection also the choice, indices int32 `[batch, heads, tokens, top_k or all
      blocks]`: the own block first, then by falling score, -1 for none.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: as `moba_attention`.
    """
    query = jnp.asarray(query)
    check_query(query, cache.key[:, :, 0, 0])
    check_positive("top_k", top_k)
    check_scale(scale)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    num_new = count_new(num_new, query)
    given = None
    if selection is not None:
        given = check_selection(selection, query)
        if selection.block_size != cache.block_size:
            raise ValueError(f"selection.block_size must be the cache's {cache.block_size}, got {selection.block_size}")

    def call(
        query: jax.Array, cache: MoBACache, given: jax.Array | None, num_new: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        query = zero_padding(query, num_new)
        blocks = cached.geometry(cache.length, num_new, query.shape[1], cache.num_blocks, cache.block_size)
        if given is None:
            indices = _choose(query, cache.mean, blocks, min(top_k, cache.num_blocks))
        else:
            indices = blocks.reachable(once_each(given, cache.num_blocks))
        backend, arrays = resolve(implementation), (query, cache.key, cache.value)
        raise_refusal(backend.refuses_decode(arrays, indices))
        output = derivatives.decode(backend, arrays, indices, cache.length, num_new, scale)
        return mark_lost(output, cache.length, num_new, cache.max_length).astype(query.dtype), indices

    operands, axes = (query, cache, given, num_new), ("b.h", cache.axes(), "bh", "b")
    output, indices = over_explicit_axes(call, operands, axes, ("b.h", "bh"))
    choice = BlockSelection(indices, cache.block_size, cache.num_blocks) if selection is None else selection
    return (output, choice) if return_selection else output


def _choose(query: jax.Array, mean: jax.Array, blocks: Blocks, top_k: int) -> jax.Array:
    """As `reference.route`, causal, from the means `[batch, kv_heads, blocks, head_dim]`."""
    group = query.shape[2] // mean.shape[1]
    choose = _choose_from_table if query.shape[1] * group <= _TABLE_ROWS else _choose_by_steps
    operands, axes = vary_alike((query, mean, blocks)), ("b.h", "bk", blocks.axes())
    return over_auto_axes(functools.partial(choose, top_k=top_k), operands, axes, "bh", group=group)


def _choose_by_steps(query: jax.Array, mean: jax.Array, blocks: Blocks, top_k: int) -> jax.Array:
    return route.by_means(query, mean, blocks, top_k, True, route.Sizes())


def _choose_from_table(query: jax.Array, mean: jax.Array, blocks: Blocks, top_k: int) -> jax.Array:
    batch, num_queries, num_heads, head_dim = query.shape
    query = query.reshape(batch, num_queries, mean.shape[1], -1, head_dim).astype(mean.dtype)
    # Axes: b batch, t queries, k key/value heads, g query heads of one, n blocks, d head_dim.
    scores = jnp.einsum("btkgd,bknd->bkgtn", query, mean, precision="highest")
    scores = scores.reshape(batch, num_heads, num_queries, -1)
    block, own = jnp.arange(mean.shape[2]), blocks.last_block[:, None, :, None]  # [blocks], [batch, 1, queries, 1]
    scores = jnp.where(scores == 0, 0, scores)  # top_k would put 0 above -0
    scores = jnp.where(block < own, scores, jnp.where(block == own, jnp.inf, -jnp.inf))
    best, indices = jax.lax.top_k(scores, top_k)  # stable: the lower index wins a tie
    return jnp.where(best == -jnp.inf, -1, indices)
