"""The public functions: checks, dispatch, and MoBA as routing followed by block-sparse attention."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.config import MOSAIC
from sparse_attn import reference, routing, xla
from sparse_attn.checks import Sequences, check_arrays, check_attention, check_positive, check_sequences
from sparse_attn.layout import Layout, make_layout
from sparse_attn.loops import at_most
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import over_explicit_axes

Implementation = Literal["reference", "xla", "pallas", "mosaic"]


def moba_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int,
    top_k: int,
    is_causal: bool = True,
    scale: float | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Mixture of Block Attention: each query attends the `top_k` key blocks whose mean key it matches best.

    For query q, with K_j the keys of block j: score_j = q . mean(K_j); the blocks of the `top_k` largest scores are
    chosen, among them always q's own block if causal; the output is softmax(scale q K^T) V over the keys of the chosen
    blocks, up to q's own position if causal. `sparse_attn.reference` states every rule (S1 to S10).
    Sources: MoBA (arXiv 2502.13189), section 2; FlashMoBA (arXiv 2511.11571), section 2.

    Args:
      query: `[batch, queries, heads, head_dim]`, floating point.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key, of query's dtype.
      block_size: keys in a block, at least 1. The last block of a segment may be shorter.
      top_k: blocks that a query attends, at least 1, the own block included. More than there are means all.
      is_causal: whether a query sees only keys up to its own position. Positions align at the end of a segment, where
        `jax.nn.dot_product_attention` aligns them at the start: with fewer queries than keys the last query stands at
        the last key.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      query_seq_lengths: int `[batch]`, real queries of each row, clipped to 0..queries; later ones are padding and give
        zeros. None: all are real; but causal, with as many queries as keys, those of key_value_seq_lengths.
      key_value_seq_lengths: int `[batch]`, real keys of each row.
      query_segment_ids: int `[batch, queries]`, for packed sequences: tokens of equal id form one segment, blocks
        restart at each, and none sees another. Given together with key_value_segment_ids.
      key_value_segment_ids: int `[batch, keys]`.
      implementation: "reference" (dense masks; on a CPU as fast up to about 128 tokens), "xla" (sparse),
        "pallas" (kernels), "mosaic" (kernels for Hopper GPUs, float16 and bfloat16, unverified: they have run on no GPU
        yet), or None for the best sparse one that can do the call.

    Returns:
      Array of query's shape and dtype; zeros for a query with nothing to attend to.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the named implementation cannot do the call.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale)
    sequences = check_sequences(
        query, key, query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids, is_causal
    )
    route, attend = _resolve(implementation)

    def call(query: jax.Array, key: jax.Array, value: jax.Array, sequences: Sequences) -> jax.Array:
        query, (key, value), layout = _prepare(query, (key, value), block_size, is_causal, *sequences)
        indices = _choose(route, query, key, layout, top_k, is_causal)
        return attend(query, key, value, indices, layout, scale=scale)[0]

    return over_explicit_axes(call, (query, key, value, sequences), ("b.h", "b.k", "b.k", "b"), "b.h")


def route_moba(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int,
    top_k: int,
    is_causal: bool = True,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> BlockSelection:
    """The blocks that each query chooses in `moba_attention`, for a look at the routing or for reuse.

    score_j = q . mean(K_j) in float32, unscaled; exact, ties to the lower block index; no gradient flows through.
    Blocks are numbered along the row; with segments, segment by segment in the order of their ids.

    Args: those of `moba_attention`.

    Returns:
      BlockSelection with indices int32 `[batch, heads, queries, top_k]`: the own block first (causal), then the others
      by falling score, -1 where a query has fewer blocks.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the named implementation cannot do the call.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    query, key = map(jnp.asarray, (query, key))
    check_arrays(query, {"key": key})
    sequences = check_sequences(
        query, key, query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids, is_causal
    )
    route, _ = _resolve(implementation)

    def call(query: jax.Array, key: jax.Array, sequences: Sequences) -> jax.Array:
        query, (key,), layout = _prepare(query, (key,), block_size, is_causal, *sequences)
        return _choose(route, query, key, layout, top_k, is_causal)

    indices = over_explicit_axes(call, (query, key, sequences), ("b.h", "b.k", "b"), "bh")
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, top_k - indices.shape[-1])), constant_values=-1)
    num_keys = key.shape[1]
    num_blocks = num_keys if query_segment_ids is not None else -(-num_keys // block_size)
    return BlockSelection(indices, block_size=block_size, num_blocks=num_blocks)


def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention over the keys of the given blocks: softmax(scale q K^T) V, each query over its own choice.

    Keys that a query may not see (a later position if causal, another segment, padding) count for nothing even in a
    chosen block. Gradients flow to query, key and value.

    Args:
      query, key, value, is_causal, scale, the sequence arguments, implementation: as in `moba_attention`.
      selection: the blocks of each query, numbered as `route_moba` does.
      return_residual: whether to return the log-sum-exp too, which `merge_partials` needs.

    Returns:
      Array of query's shape and dtype. With return_residual, also the natural log-sum-exp of each query's logits,
      float32 `[batch, queries, heads]`, -inf for a query with nothing to attend to.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the named implementation cannot do the call.
    """
    query, key, value, indices = map(jnp.asarray, (query, key, value, selection.indices))
    scale = check_attention(query, key, value, scale)
    batch, num_queries, num_heads, _ = query.shape
    block_size = selection.block_size
    check_positive("selection.block_size", block_size)
    is_integer = jnp.issubdtype(indices.dtype, jnp.integer)
    if (
        indices.ndim != 4
        or indices.shape[:3] != (batch, num_heads, num_queries)
        or 0 in indices.shape
        or not is_integer
    ):
        raise ValueError(
            f"selection.indices must be integers of shape (batch, heads, queries, top_k) = ({batch}, {num_heads}, "
            f"{num_queries}, at least 1), got {indices.dtype} of shape {indices.shape}"
        )
    sequences = check_sequences(
        query, key, query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids, is_causal
    )
    _, attend = _resolve(implementation)

    def call(
        query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, sequences: Sequences
    ) -> tuple[jax.Array, jax.Array]:
        query, (key, value), layout = _prepare(query, (key, value), block_size, is_causal, *sequences)
        indices = _once_each(indices, _max_choices(layout))
        return attend(query, key, value, indices, layout, scale=scale)

    operands, axes = (query, key, value, indices, sequences), ("b.h", "b.k", "b.k", "bh", "b")
    output, log_sum_exp = over_explicit_axes(call, operands, axes, ("b.h", "b.h"))
    return (output, log_sum_exp) if return_residual else output


def _max_choices(layout: Layout) -> int:
    """The most blocks that one query can attend: those of a row without segments."""
    return -(-layout.num_keys // layout.block_size)


def _choose(
    route: Callable[..., jax.Array], query: jax.Array, key: jax.Array, layout: Layout, top_k: int, is_causal: bool
) -> jax.Array:
    """The router's choice without a gradient, int32 `[batch, heads, queries, top_k or fewer]`."""
    query, key = jax.lax.stop_gradient((query, key))
    indices = route(query, key, layout, top_k=at_most(top_k, _max_choices(layout)), is_causal=is_causal)
    return checkpoint_name(indices, "block_selection")


def _once_each(indices: jax.Array, most: int) -> jax.Array:
    """Lists `[..., top_k]` in another order, no id twice and no longer than `most`; -1 for what goes."""
    indices = -jnp.sort(-indices.astype(jnp.int32), axis=-1)
    is_again = jnp.pad(indices[..., 1:] == indices[..., :-1], ((0, 0),) * (indices.ndim - 1) + ((1, 0),))
    indices = jnp.where(is_again, -1, indices)
    return indices if indices.shape[-1] <= most else -jnp.sort(-indices, axis=-1)[..., :most]


def _resolve(
    implementation: Implementation | None,
) -> tuple[Callable[..., jax.Array], Callable[..., tuple[jax.Array, jax.Array]]]:
    """The functions that route and attend."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be None or one of {get_args(Implementation)}, got {implementation!r}")
    platform = jax.default_backend()
    kernels = {"pallas": ("gpu", "tpu"), "mosaic": ("gpu",)}
    if implementation in kernels and platform not in kernels[implementation]:
        raise NotImplementedError(f"{implementation=} has no kernels for {platform}; use 'xla'")
    if implementation == "reference":
        return reference.route, reference.attend
    # The GPU kernels have run on no GPU yet: they are taken by name only.
    if implementation == "xla" or (implementation is None and platform != "tpu"):
        return routing.route, xla.attend
    from sparse_attn import pallas  # here, so that the library does without Pallas where there are no kernels

    if implementation == "pallas":
        return pallas.route, pallas.attend
    if implementation == "mosaic":
        return pallas.route, functools.partial(pallas.attend, config=MOSAIC)
    return _first_supported(pallas.route, routing.route), _first_supported(pallas.attend, xla.attend)


def _first_supported(preferred: Callable[..., Any], fallback: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the fallback for calls that the preferred one cannot do."""

    def call(*args: Any, **options: Any) -> Any:
        try:
            return preferred(*args, **options)
        except NotImplementedError:
            return fallback(*args, **options)

    return call


def _prepare(
    query: jax.Array,
    key_values: tuple[jax.Array, ...],
    block_size: int,
    is_causal: bool,
    query_seq_lengths: jax.Array | None,
    key_value_seq_lengths: jax.Array | None,
    query_segment_ids: jax.Array | None,
    key_value_segment_ids: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...], Layout]:
    """Empties the padding (S7), lays out the batch and puts the keys in block order."""
    num_queries, num_keys = query.shape[1], key_values[0].shape[1]
    layout = make_layout(
        num_queries,
        num_keys,
        batch_size=query.shape[0],
        block_size=at_most(block_size, num_keys),
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    )
    query = _zero_padding(query, query_seq_lengths)
    key_values = tuple(layout.order_keys(_zero_padding(array, key_value_seq_lengths)) for array in key_values)
    return query, key_values, layout


def _zero_padding(array: jax.Array, seq_lengths: jax.Array | None) -> jax.Array:
    """Zeros behind the real tokens of `[batch, sequence, heads, head_dim]`, so that NaN there cannot spread."""
    if seq_lengths is None:
        return array
    is_real = jnp.arange(array.shape[1])[None, :] < seq_lengths[:, None]  # [batch, sequence]
    return jnp.where(is_real[..., None, None], array, 0)
