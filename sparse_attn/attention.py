"""The public functions: checks, and MoBA as routing followed by block-sparse attention."""

from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import Arrays, Blocks, Results
from sparse_attn.attend import derivatives
from sparse_attn.attend.backends import Implementation, resolve
from sparse_attn.attend.choice import Choice, PerQuery
from sparse_attn.checks import (
    Sequences,
    check_arrays,
    check_attention,
    check_positive,
    check_selection,
    check_sequences,
    takes_no_batch,
)
from sparse_attn.layout import make_blocks, order_keys, zero_padding
from sparse_attn.loops import at_most
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import over_explicit_axes


@takes_no_batch
def moba_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int,
    top_k: int,
    is_causal: bool,
    scale: float | None = None,
    segment_ids: ArrayLike | None = None,
    seq_lengths: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Mixture of Block Attention: each query attends the `top_k` key blocks whose mean key it matches best.

    For query q, with K_j the keys of block j: score_j = q . mean(K_j); the blocks of the `top_k` largest scores are
    chosen, among them always q's own block if causal; the output is softmax(scale q K^T) V over the keys of the chosen
    blocks, up to q's own position if causal. `sparse_attn.reference` states every rule (S1 to S10).
    Sources: MoBA (arXiv 2502.13189), section 2; FlashMoBA (arXiv 2511.11571), section 2.

    Args:
      query: `[batch, queries, heads, head_dim]`, floating point; or all arrays without the batch axis.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: `[batch, keys, kv_heads, value_head_dim]`, of query's dtype.
      block_size: keys in a block, at least 1. The last block of a segment may be shorter.
      top_k: blocks that a query attends, at least 1, the own block included. More than there are means all.
      is_causal: whether a query sees only keys up to its own position. Positions align at the end of a segment, where
        `jax.nn.dot_product_attention` aligns them at the start: with fewer queries than keys the last query stands at
        the last key.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      segment_ids: int `[batch, sequence]`, for packed self-attention: tokens of equal id form one segment, blocks
        restart at each, and none sees another.
      seq_lengths: int `[batch]`, real tokens of each row of self-attention, clipped to 0..sequence; later ones are
        padding and give zeros.
      query_seq_lengths: seq_lengths of the queries, where they differ. None: all are real; but causal, with as many
        queries as keys, those of key_value_seq_lengths.
      key_value_seq_lengths: seq_lengths of the keys.
      query_segment_ids: segment_ids of the queries, where they differ; together with key_value_segment_ids.
      key_value_segment_ids: segment_ids of the keys.
      implementation: "reference" (dense masks; on a CPU as fast up to about 128 tokens), "xla" (sparse),
        "pallas" (kernels for TPUs and NVIDIA GPUs), "mosaic" (kernels for Hopper GPUs), a backend of
        `sparse_attn.attend.backends` with sizes of its own, or None for the best sparse one that can do the call.

    Returns:
      Array `[batch, queries, heads, value_head_dim]` of query's dtype; zeros for a query with nothing to attend to.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the implementation cannot do the call, with its reason; where it depends on the platform,
        when the program is compiled.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale, own_head_dim=True)
    given = Sequences(query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids)
    sequences = check_sequences(
        query, key, given, segment_ids=segment_ids, seq_lengths=seq_lengths, is_causal=is_causal
    )

    def call(query: jax.Array, key: jax.Array, value: jax.Array, sequences: Sequences) -> jax.Array:
        query, (key, value), blocks = _prepare(query, (key, value), sequences, block_size, is_causal)
        indices = choose(query, key, blocks, top_k, is_causal, implementation)
        return attend((query, key, value), PerQuery(indices, blocks), scale, implementation)[0].astype(query.dtype)

    return over_explicit_axes(call, (query, key, value, sequences), ("b.h", "b.k", "b.k", "b"), "b.h")


@takes_no_batch
def route_moba(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int,
    top_k: int,
    is_causal: bool,
    segment_ids: ArrayLike | None = None,
    seq_lengths: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
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
      NotImplementedError: as `moba_attention`.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    query, key = map(jnp.asarray, (query, key))
    check_arrays(query, {"key": key})
    given = Sequences(query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids)
    sequences = check_sequences(
        query, key, given, segment_ids=segment_ids, seq_lengths=seq_lengths, is_causal=is_causal
    )

    def call(query: jax.Array, key: jax.Array, sequences: Sequences) -> jax.Array:
        query, (key,), blocks = _prepare(query, (key,), sequences, block_size, is_causal)
        return choose(query, key, blocks, top_k, is_causal, implementation)

    indices = over_explicit_axes(call, (query, key, sequences), ("b.h", "b.k", "b"), "bh")
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, top_k - indices.shape[-1])), constant_values=-1)
    num_keys = key.shape[1]
    num_blocks = num_keys if sequences.query_segment_ids is not None else -(-num_keys // block_size)
    return BlockSelection(indices, block_size=block_size, num_blocks=num_blocks)


class _Options(TypedDict, total=False):
    """The other arguments of `block_sparse_attention`."""

    scale: float | None
    segment_ids: ArrayLike | None
    seq_lengths: ArrayLike | None
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    implementation: Implementation | None


@overload
def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection,
    *,
    is_causal: bool,
    return_residual: Literal[False] = False,
    **options: Unpack[_Options],
) -> jax.Array: ...


@overload
def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection,
    *,
    is_causal: bool,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array]: ...


@takes_no_batch
def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection,
    *,
    is_causal: bool,
    scale: float | None = None,
    segment_ids: ArrayLike | None = None,
    seq_lengths: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
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
      Array `[batch, queries, heads, value_head_dim]` of query's dtype. With return_residual, also the natural
      log-sum-exp of each query's logits, float32 `[batch, queries, heads]`, -inf for a query with nothing to attend to.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: as `moba_attention`.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale, own_head_dim=True)
    indices, block_size = check_selection(selection, query), selection.block_size
    given = Sequences(query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids)
    sequences = check_sequences(
        query, key, given, segment_ids=segment_ids, seq_lengths=seq_lengths, is_causal=is_causal
    )

    def call(query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, sequences: Sequences) -> Results:
        query, (key, value), blocks = _prepare(query, (key, value), sequences, block_size, is_causal)
        choice = PerQuery(once_each(indices, blocks.max_choices), blocks)
        output, log_sum_exp = attend((query, key, value), choice, scale, implementation)
        return output.astype(query.dtype), log_sum_exp

    operands, axes = (query, key, value, indices, sequences), ("b.h", "b.k", "b.k", "bh", "b")
    output, log_sum_exp = over_explicit_axes(call, operands, axes, ("b.h", "b.h"))
    return (output, log_sum_exp) if return_residual else output


def attend(arrays: Arrays, choice: Choice, scale: float, implementation: Implementation | None = None) -> Results:
    """Attention over a choice, for arrays in block order and checked.

    Raises:
      NotImplementedError: the implementation cannot do the call.
    """
    backend = resolve(implementation)
    raise_refusal(backend.refuses(arrays, choice))
    return derivatives.attend(backend, arrays, choice, scale)


def choose(
    query: jax.Array,
    key: jax.Array,
    blocks: Blocks,
    top_k: int,
    is_causal: bool,
    implementation: Implementation | None,
) -> jax.Array:
    """The router's choice, int32 `[batch, heads, queries, top_k or fewer]`."""
    backend, top_k = resolve(implementation), at_most(top_k, blocks.max_choices)
    raise_refusal(backend.refuses_route(query, top_k))
    return derivatives.route(backend, query, key, blocks, top_k=top_k, is_causal=is_causal)


def raise_refusal(reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(f"{reason}; implementation='xla' does every call")


def once_each(indices: jax.Array, most: int) -> jax.Array:
    """Lists `[..., top_k]` in another order, no id twice and no longer than `most`; -1 for what goes."""
    indices = -jnp.sort(-indices.astype(jnp.int32), axis=-1)
    is_again = jnp.pad(indices[..., 1:] == indices[..., :-1], ((0, 0),) * (indices.ndim - 1) + ((1, 0),))
    indices = jnp.where(is_again, -1, indices)
    return indices if indices.shape[-1] <= most else -jnp.sort(-indices, axis=-1)[..., :most]


def _prepare(
    query: jax.Array, key_values: tuple[jax.Array, ...], sequences: Sequences, block_size: int, is_causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...], Blocks]:
    """Empties the padding (S7), lays out the batch and puts the keys in block order."""
    block_size = at_most(block_size, key_values[0].shape[1])
    blocks, key_order = make_blocks(query, key_values[0], sequences, block_size=block_size, is_causal=is_causal)
    query = zero_padding(query, sequences.query_seq_lengths)
    lengths = sequences.key_value_seq_lengths
    return query, tuple(order_keys(zero_padding(array, lengths), key_order) for array in key_values), blocks
