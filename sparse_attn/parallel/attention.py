"""MoBA over a sequence that is split over devices: the call, its checks, and the two simple ways of computing it.

    "gather"             every device gathers all keys and values, and attends with the queries it has
    "ulysses"            devices trade tokens for heads (all-to-all), attend whole sequences, and trade back
    "dispatch"           queries travel to the shards that hold their blocks (`sparse_attn.parallel.dispatch`)
    "ulysses+dispatch"   over two mesh axes: heads are traded along the inner one, queries sent along the outer one

Sources: DeepSpeed-Ulysses (arXiv 2309.14509); the all-gather is context parallelism as in Llama 3 (arXiv 2407.21783),
section 3.3.2. Choices are those of `moba_attention`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn.attend.backends import Implementation
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attention import attend, choose, moba_attention
from sparse_attn.checks import (
    Sequences,
    check_attention,
    check_integers,
    check_not_negative,
    check_one_of,
    check_positive,
    check_self_attention,
)
from sparse_attn.layout import make_blocks, order_keys
from sparse_attn.loops import at_most
from sparse_attn.parallel.communication import METHODS, AxisName, Call, Method, choose_method
from sparse_attn.parallel.dispatch import attend_dispatched
from sparse_attn.parallel.layout import CONTIGUOUS, Layout, shard_sequence, unshard_sequence
from sparse_attn.parallel.shard import gather_sequence
from sparse_attn.sharding import own_promotion


def moba_attention_sharded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: AxisName,
    block_size: int,
    top_k: int,
    method: Method | None = None,
    layout: Layout = CONTIGUOUS,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    max_segments: int | None = None,
    rows_per_round: int | None = None,
    copied_blocks: int = 0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal `moba_attention` of a sequence whose tokens are split over a mesh axis; call it inside `jax.shard_map`.

    The choices are those of `moba_attention` on the whole sequence, outputs and gradients equal it to rounding. Reverse
    mode alone differentiates "dispatch". Every device of the axis holds as many tokens.

    Args:
      query: `[batch, local_tokens, heads, head_dim]`, floating point, the shard of this device.
      key: `[batch, local_tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: `[batch, local_tokens, kv_heads, value_head_dim]`, of query's dtype.
      axis_name: the mesh axis that splits the sequence; or two of them, outer and inner, as in
        `PartitionSpec(None, ("outer", "inner"))`.
      block_size: keys in a block, at least 1.
      top_k: blocks that a query attends, at least 1, the own block included.
      method: "gather", "ulysses", "dispatch", or over two axes "ulysses+dispatch". None: the one of those that fit
        whose devices receive the fewest bytes, forward and backward, by `communication_bytes`.
      layout: which tokens lie on which shard, as `shard_sequence` put them.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      segment_ids: int `[batch, local_tokens]`, the shard's part of packed documents: tokens of equal id form one
        segment, wherever they lie; blocks restart at each, and none sees another.
      max_segments: segments in a row at most, which bounds the table of block means; "dispatch" needs it together with
        segment_ids. A row with more blocks than so many segments can have gives NaN there.
      rows_per_round: rows (queries of one head) that "dispatch" sends from shard to shard at a time, for each key/value
        head; rounds go on until none is left. None: so many that an even load takes four rounds.
      copied_blocks: "dispatch" copies so many blocks of each batch row to every device, those that queries of other
        shards choose most, instead of sending these queries to one shard. Shards must hold whole blocks.
      implementation: as of `moba_attention`.

    Returns:
      Array `[batch, local_tokens, heads, value_head_dim]` of query's dtype: the shard of the output.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or does not fit the mesh axis.
      NotImplementedError: as `moba_attention`.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale, own_head_dim=True)
    check_self_attention(query, key)
    segment_ids = check_integers("segment_ids", segment_ids, query.shape[:2])
    if method is not None:
        check_one_of("method", method, METHODS)
    for name, number in (("max_segments", max_segments), ("rows_per_round", rows_per_round)):
        if number is not None:
            check_positive(name, number)
    check_not_negative("copied_blocks", copied_blocks)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    _check_axes(names)
    call = Call(
        axis_names=names,
        axis_sizes=tuple(map(jax.lax.axis_size, names)),
        query=_type_of(query),
        key=_type_of(key),
        value=_type_of(value),
        block_size=block_size,
        top_k=top_k,
        layout=layout,
        segment_ids=None if segment_ids is None else _type_of(segment_ids),
        max_segments=max_segments,
        rows_per_round=rows_per_round,
        copied_blocks=copied_blocks,
    )
    if method is None:
        method = choose_method(call)
    elif (reason := call.refuses(method)) is not None:
        raise ValueError(reason)
    outer, inner = call.axes(method)
    options: dict[str, Any] = {"block_size": at_most(block_size, call.num_tokens), "top_k": top_k, "scale": scale}
    options |= {"implementation": implementation}
    with own_promotion():
        if inner is not None:
            trade = functools.partial(_tokens_for_heads, axis_name=inner, layout=layout)
            query, key, value = (trade(_repeat_heads(array, inner)) for array in (query, key, value))
            if segment_ids is not None:
                segment_ids = gather_sequence(segment_ids, inner, layout)
            layout = layout.of_neighbours(jax.lax.axis_size(inner))
        if outer is None:
            output = moba_attention(query, key, value, is_causal=True, segment_ids=segment_ids, **options)
        elif method == "gather":
            output = _attend_gathered(query, key, value, segment_ids, axis_name=outer, layout=layout, **options)
        else:
            output = attend_dispatched(
                query, key, value, segment_ids, axis_name=outer, layout=layout, num_blocks=call.num_blocks,
                rows_per_round=call.capacity(method), copied_blocks=copied_blocks, **options,
            )  # fmt: skip
        return output if inner is None else _heads_for_tokens(output, inner, call.layout)


def _check_axes(names: tuple[str, ...]) -> None:
    """The call stands inside a `jax.shard_map` that splits the sequence and leaves no axis of the mesh to others."""
    mesh = jax.sharding.get_abstract_mesh()
    for name in names:
        if name not in mesh.manual_axes:
            raise ValueError(f"axis_name must be of a jax.shard_map around the call, {mesh.manual_axes}, got {name!r}")
    left = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes and size > 1}
    if left:
        raise ValueError(f"the jax.shard_map around the call must take every axis of the mesh, got it without {left}")


def _type_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _repeat_heads(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """`[batch, tokens, heads, x]` with each head as often as it takes to give every device of the axis one."""
    times = jax.lax.axis_size(axis_name) // array.shape[2]
    return array if times <= 1 else jnp.repeat(array, times, axis=2)


def _tokens_for_heads(array: jax.Array, axis_name: AxisName, layout: Layout) -> jax.Array:
    """`[batch, tokens, heads, x]` of P devices -> `[batch, P * tokens, heads / P, x]`, in the order of the sequence."""
    array = jax.lax.all_to_all(array, axis_name, split_axis=2, concat_axis=1, tiled=True)
    return unshard_sequence(array, num_shards=jax.lax.axis_size(axis_name), layout=layout)


def _heads_for_tokens(array: jax.Array, axis_name: AxisName, layout: Layout) -> jax.Array:
    """Undoes `_tokens_for_heads`."""
    array = shard_sequence(array, num_shards=jax.lax.axis_size(axis_name), layout=layout)
    return jax.lax.all_to_all(array, axis_name, split_axis=1, concat_axis=2, tiled=True)


def _attend_gathered(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    axis_name: AxisName,
    layout: Layout,
    block_size: int,
    top_k: int,
    scale: float,
    implementation: Implementation | None,
) -> jax.Array:
    """The shard's queries over all keys; arguments as of `moba_attention_sharded`."""
    num_tokens, shards = query.shape[1], jax.lax.axis_size(axis_name)
    key, value = gather_sequence(key, axis_name, layout), gather_sequence(value, axis_name, layout)
    ids = None if segment_ids is None else gather_sequence(segment_ids, axis_name, layout)
    blocks, key_order = make_blocks(key, key, Sequences(None, None, ids, ids), block_size=block_size, is_causal=True)
    position = layout.positions(jax.lax.axis_index(axis_name), num_tokens, shards)
    of_query = {name: getattr(blocks, name)[:, position] for name in ("start", "stop", "first_block", "last_block")}
    blocks = dataclasses.replace(blocks, **of_query)
    key, value = order_keys(key, key_order), order_keys(value, key_order)
    indices = choose(query, key, blocks, top_k, True, implementation)
    return attend((query, key, value), PerQuery(indices, blocks), scale, implementation)[0].astype(query.dtype)
