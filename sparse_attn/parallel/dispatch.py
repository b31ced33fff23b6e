"""Queries sent to the shards that hold their blocks: MoBA over devices with keys and values that stay at home.

Every device knows the means of all blocks, so each query chooses among all blocks of the sequence at home. A *row* is
one query of one head. It travels to every other shard that holds keys of its blocks which it may see, with the list of
its blocks, is attended there, and comes back as an output and its log-sum-exp, to be merged with what the row found at
home. Rows travel in rounds: in one, each device sends at most `capacity` rows to each shard for each key/value head,
padded, by an all-to-all. As many rounds run as the busiest pair of devices needs, so that no row is dropped.

The backward pass sends the same rows by the same plan, with the gradient of the output, the log-sum-exp over all keys
and delta, and gets the gradient of the query back. Gradients of keys and values add up where the keys are.

Blocks that many ask for, such as a sequence's first, can be copied to every device; nobody travels for those.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Arrays, Blocks, Results
from sparse_attn.attend import derivatives
from sparse_attn.attend.backends import Implementation, resolve
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attend.derivatives import output_gradient
from sparse_attn.attend.partial import Partial, as_partial
from sparse_attn.attention import attend, choose
from sparse_attn.layout import order_keys
from sparse_attn.parallel.communication import AxisName, list_dtype
from sparse_attn.parallel.layout import Layout
from sparse_attn.parallel.shard import Shard, all_means, find_hottest, know_copies, lay_out, with_copies
from sparse_attn.sharding import vary_alike, varying


@dataclasses.dataclass(frozen=True)
class _Journey:
    """How rows travel.

    Attributes:
      axis_name: the mesh axis.
      capacity: rows that a round sends to each shard for each key/value head.
      sends_stop: whether a shard may hold a part of a block that a row sees only in part.
      list_dtype: of the travelling lists of blocks.
      scale: factor of the logits.
      implementation: what attends.
    """

    axis_name: AxisName
    capacity: int
    sends_stop: bool
    list_dtype: jnp.dtype
    scale: float
    implementation: Implementation | None


class _Rows(NamedTuple):
    """The rows of a device: queries of the heads that share a key/value head of a batch row, query-major.

    Attributes:
      lists: `[batch * kv_heads, rows, top_k]`, blocks chosen, -1 for none.
      stop: int32 `[batch * kv_heads, rows, 1]`, the place behind the last key a row sees.
      of_slot: int32 `[batch * kv_heads, shards, slots]`, the row that travels in each slot, the number of rows for
        none.
      rounds: int32, rounds of `capacity` slots that some device needs.
    """

    lists: jax.Array
    stop: jax.Array
    of_slot: jax.Array
    rounds: jax.Array


def attend_dispatched(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    axis_name: AxisName,
    layout: Layout,
    block_size: int,
    num_blocks: int,
    top_k: int,
    scale: float,
    rows_per_round: int,
    copied_blocks: int,
    implementation: Implementation | None,
) -> jax.Array:
    """`moba_attention_sharded` by dispatch.

    Args:
      query: `[batch, tokens, heads, head_dim]`, the shard; key and value likewise.
      segment_ids: `[batch, tokens]`, of the shard.
      axis_name: the mesh axis of the shards.
      num_blocks: upper bound of the blocks of a row.
      rows_per_round: at most the rows there are.
      layout, block_size, top_k, scale, copied_blocks, implementation: as of `moba_attention_sharded`.
    """
    batch, num_tokens = query.shape[:2]
    shard, key_order, is_possible = lay_out(
        segment_ids, (batch, num_tokens), axis_name=axis_name, layout=layout, block_size=block_size,
        num_blocks=num_blocks,
    )  # fmt: skip
    key, value = order_keys(key, key_order), order_keys(value, key_order)
    means = all_means(jax.lax.stop_gradient(key), shard, axis_name, layout)
    indices = _choose(jax.lax.stop_gradient(query), means, shard, top_k, implementation)
    if copied_blocks:
        hottest = find_hottest(indices, shard, min(copied_blocks, num_blocks), axis_name)
        key, value = (with_copies(array, hottest, shard, axis_name) for array in (key, value))
        shard = know_copies(shard, hottest)
    journey = _Journey(
        axis_name=axis_name,
        capacity=rows_per_round,
        sends_stop=segment_ids is not None,
        list_dtype=list_dtype(num_blocks),
        scale=scale,
        implementation=implementation,
    )
    arrays, indices, shard = vary_alike(((query, key, value), indices, shard))
    output = _attend(journey, arrays, indices, shard)
    return output if is_possible is None else output * jnp.where(is_possible, 1, jnp.nan).astype(output.dtype)


def _choose(
    query: jax.Array, means: jax.Array, shard: Shard, top_k: int, implementation: Implementation | None
) -> jax.Array:
    """The blocks of the whole row that the local queries choose, int32 `[batch, heads, tokens, top_k or fewer]`.

    A router of blocks of one key takes the means as they are.
    """
    number = jnp.arange(means.shape[1], dtype=jnp.int32)[None].repeat(means.shape[0], 0)
    blocks = Blocks(
        start=shard.first_block,
        stop=shard.last_block + 1,
        position=None,
        block_start=number,
        block_length=jnp.ones_like(number),
        first_block=shard.first_block,
        last_block=shard.last_block,
        block_size=1,
        num_keys=means.shape[1],
        is_packed=False,
    )
    return choose(query.astype(means.dtype), means, blocks, top_k, True, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(journey: _Journey, arrays: Arrays, indices: jax.Array, shard: Shard) -> jax.Array:
    """Attention of the local queries to the chosen blocks, wherever they lie."""
    return _forward(journey, arrays, indices, shard)[0]


def _forward(
    journey: _Journey, arrays: Arrays, indices: jax.Array, shard: Shard
) -> tuple[jax.Array, tuple[Arrays, jax.Array, Shard, Results]]:
    query, key, value = arrays
    kv_heads, num_tokens = key.shape[2], query.shape[1]
    run = functools.partial(attend, scale=journey.scale, implementation=journey.implementation)
    output, log_sum_exp = run(arrays, shard.local_choice(indices))
    exact = jnp.promote_types(query.dtype, jnp.float32)
    here = as_partial(_to_rows(output.astype(exact), kv_heads), _to_rows(log_sum_exp[..., None], kv_heads)[..., 0])

    rows = _plan(journey, indices, shard, kv_heads)
    query_rows, keys, values = _to_rows(query, kv_heads), _to_items(key), _to_items(value)

    def attend_round(number: jax.Array, found: Partial) -> Partial:
        row, choice, (queries,) = _send(journey, rows, number, shard, (query_rows,), kv_heads)
        output, log_sum_exp = run((queries, keys, values), choice)
        output, log_sum_exp = _send_back(journey, (output.astype(query.dtype), log_sum_exp[..., None]))
        return _merge_rows(found, row, output.astype(exact), log_sum_exp[..., 0])

    found = jax.lax.fori_loop(0, rows.rounds, attend_round, vary_alike(here, arrays))
    output = _from_rows(found.output(), kv_heads, num_tokens)
    log_sum_exp = _from_rows(found.log_sum_exp()[..., None], kv_heads, num_tokens)[..., 0]
    return output.astype(query.dtype), (arrays, indices, shard, (output, log_sum_exp))


def _backward(
    journey: _Journey, residuals: tuple[Arrays, jax.Array, Shard, Results], d_output: jax.Array
) -> tuple[Arrays, None, None]:
    """Every shard does its part of dQ and all of dK and dV, from the log-sum-exp over all of a query's keys.

    A backend takes delta as minus the gradient of the log-sum-exp, with an output of zero.
    """
    arrays, indices, shard, results = residuals
    query, key, value = arrays
    kv_heads, num_tokens = key.shape[2], query.shape[1]
    d_output = vary_alike(d_output, arrays)
    no_gradient = jnp.zeros_like(results[1])
    d_output, delta = output_gradient(arrays, results, (d_output, no_gradient))

    def pull_back(arrays: Arrays, choice: PerQuery, d_output: jax.Array, numbers: tuple) -> Arrays:
        log_sum_exp, delta = numbers
        backend = resolve(journey.implementation)
        no_output = jnp.zeros(d_output.shape, log_sum_exp.dtype)
        results, cotangents = vary_alike(((no_output, log_sum_exp), (d_output.astype(no_output.dtype), -delta)), arrays)
        return derivatives.pull_back(backend, journey.scale, arrays, choice, results, cotangents)

    exact = results[1].dtype
    gradients = pull_back(arrays, shard.local_choice(indices), d_output, (results[1], delta))
    here = _to_rows(gradients[0], kv_heads), _to_items(gradients[1]), _to_items(gradients[2])
    rows = _plan(journey, indices, shard, kv_heads)
    keys, values = _to_items(key), _to_items(value)
    numbers = jnp.stack([results[1], delta], axis=-1)  # [batch, tokens, heads, 2]
    sent = tuple(_to_rows(array, kv_heads) for array in (query, d_output, numbers))

    def differentiate_round(number: jax.Array, found: Arrays) -> Arrays:
        row, choice, (queries, d_outputs, numbers) = _send(journey, rows, number, shard, sent, kv_heads)
        d_queries, d_keys, d_values = pull_back(
            (queries, keys, values), choice, d_outputs, (numbers[..., 0], numbers[..., 1])
        )
        (d_queries,) = _send_back(journey, (d_queries,))
        d_queries = jax.vmap(lambda sum, row, new: sum.at[row].add(new, mode="drop"))(
            found[0], row, d_queries.astype(exact)
        )
        return d_queries, found[1] + d_keys, found[2] + d_values

    found = vary_alike(jax.tree.map(lambda array: array.astype(exact), here), arrays)
    d_query, d_key, d_value = jax.lax.fori_loop(0, rows.rounds, differentiate_round, found)
    d_query = _from_rows(d_query, kv_heads, num_tokens).astype(query.dtype)
    d_key, d_value = (_from_items(array, kv_heads).astype(key.dtype) for array in (d_key, d_value))
    return (d_query, d_key, d_value), None, None


_attend.defvjp(_forward, _backward)


def _plan(journey: _Journey, indices: jax.Array, shard: Shard, kv_heads: int) -> _Rows:
    """Which row travels where in which round.

    Args:
      indices: `[batch, heads, tokens, top_k]`, blocks chosen, -1 for none.
    """
    batch, num_heads, num_tokens, top_k = indices.shape
    indices = indices.swapaxes(1, 2)  # [batch, tokens, heads, top_k]
    shards, here = jax.lax.axis_size(journey.axis_name), jax.lax.axis_index(journey.axis_name)
    goes = jnp.zeros((batch, num_tokens, num_heads, shards), bool)
    for choice in range(top_k):
        block = indices[..., choice]
        first = jax.vmap(lambda first, block: first[block])(shard.first_place, jnp.maximum(block, 0))
        goes |= (block >= 0)[..., None] & (first < shard.stop[..., None, None])
    goes &= jnp.arange(shards) != here
    goes = _to_rows(goes, kv_heads)  # [batch * kv_heads, rows, shards]

    num_rows = goes.shape[1]
    most = goes.sum(1).max()
    # All devices that run the loop, even those with other rows of the batch, for it has collectives in it.
    everywhere = tuple(sorted(varying(most))) or jax.sharding.get_abstract_mesh().manual_axes  # without check_vma
    rounds = jax.lax.pmax(-(-most // journey.capacity), everywhere)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    of_slot = jnp.sort(jnp.where(goes, row, num_rows), axis=1).swapaxes(1, 2)  # those that go first, in order
    padding = ((0, 0), (0, 0), (0, -num_rows % journey.capacity))
    of_slot = jnp.pad(of_slot, padding, constant_values=num_rows)
    stop = jnp.broadcast_to(shard.stop[:, :, None, None], (batch, num_tokens, num_heads, 1))
    return _Rows(_to_rows(indices, kv_heads), _to_rows(stop, kv_heads), of_slot, rounds)


def _send(
    journey: _Journey, rows: _Rows, number: jax.Array, shard: Shard, arrays: tuple[jax.Array, ...], kv_heads: int
) -> tuple[jax.Array, PerQuery, list[jax.Array]]:
    """One round on its way out.

    Args:
      number: of the round.
      arrays: what travels with the rows, `[batch * kv_heads, rows, x]`.

    Returns:
      The rows that left, int32 `[batch * kv_heads, shards * capacity]`; and of those that came, the choice and the
      arrays `[batch * kv_heads, shards * capacity, 1, x]`, whose last axis but one is the only head.
    """
    capacity = journey.capacity
    row = jax.lax.dynamic_slice_in_dim(rows.of_slot, number * capacity, capacity, axis=2)
    row = row.reshape(row.shape[0], -1)

    def send(array: jax.Array, fill: int = 0) -> jax.Array:
        array = jax.vmap(lambda array, row: array.at[row].get(mode="fill", fill_value=fill))(array, row)
        return _all_to_all(array, journey.axis_name)[:, :, None]

    lists = send(rows.lists.astype(journey.list_dtype), -1).astype(jnp.int32).swapaxes(1, 2)
    stop = send(rows.stop)[:, :, 0, 0] if journey.sends_stop else None
    shard = jax.tree.map(lambda table: jnp.repeat(table, kv_heads, axis=0), shard)
    return row, shard.choice(lists, stop), [send(array) for array in arrays]


def _send_back(journey: _Journey, arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    """One round on its way home: `[batch * kv_heads, shards * capacity, 1, x]`, as of `_send`, without the heads."""
    return [_all_to_all(array[:, :, 0], journey.axis_name) for array in arrays]


def _all_to_all(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """`[items, shards * capacity, x]`: part i of axis 1 goes to shard i, and what came from shard i stands there."""
    return jax.lax.all_to_all(array, axis_name, split_axis=1, concat_axis=1, tiled=True)


def _merge_rows(found: Partial, row: jax.Array, output: jax.Array, log_sum_exp: jax.Array) -> Partial:
    """Adds attention over further keys to that of the rows; a row may come back from several shards at once.

    Args:
      found: of all rows, `[items, rows]` and `[items, rows, head_dim]`.
      row: int32 `[items, slots]`, where the results belong; out of range for nowhere.
      output: `[items, slots, head_dim]`.
      log_sum_exp: `[items, slots]`, -inf for none.
    """

    def merge(found: Partial, row: jax.Array, output: jax.Array, log_sum_exp: jax.Array) -> Partial:
        maximum = found.maximum.at[row].max(log_sum_exp, mode="drop")
        reference = jnp.where(jnp.isneginf(maximum), 0, maximum)
        factor = jnp.exp(found.maximum - reference)
        weight = jnp.exp(log_sum_exp - reference.at[row].get(mode="fill", fill_value=0))
        total = (factor * found.total).at[row].add(weight, mode="drop")
        accumulator = (factor[:, None] * found.accumulator).at[row].add(weight[:, None] * output, mode="drop")
        return Partial(maximum, total, accumulator)

    return jax.vmap(merge)(found, row, output, log_sum_exp)


def _to_rows(array: jax.Array, kv_heads: int) -> jax.Array:
    """`[batch, tokens, heads, x]` -> `[batch * kv_heads, tokens * group, x]`."""
    batch, num_tokens, _, size = array.shape
    array = array.reshape(batch, num_tokens, kv_heads, -1, size).swapaxes(1, 2)
    return array.reshape(batch * kv_heads, -1, size)


def _from_rows(array: jax.Array, kv_heads: int, num_tokens: int) -> jax.Array:
    """Undoes `_to_rows`."""
    size = array.shape[-1]
    array = array.reshape(-1, kv_heads, num_tokens, array.shape[1] // num_tokens, size).swapaxes(1, 2)
    return array.reshape(array.shape[0], num_tokens, -1, size)


def _to_items(array: jax.Array) -> jax.Array:
    """`[batch, tokens, kv_heads, x]` -> `[batch * kv_heads, tokens, 1, x]`."""
    return _to_rows(array, array.shape[2])[:, :, None]


def _from_items(array: jax.Array, kv_heads: int) -> jax.Array:
    """Undoes `_to_items`."""
    return _from_rows(array[:, :, 0], kv_heads, array.shape[1])
