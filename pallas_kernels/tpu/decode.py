"""Attention of a few new tokens to the chosen blocks of a cache, on a TPU: flash decoding over a list of blocks.

    head 0, a union of six blocks     b1 b3 b6 b7 | b9 b12           two steps of up to four blocks, here
    head 1, one of three              b0 b4 b5                       one step

    grid            step 0              step 1              step 2
    HBM to VMEM     fetch b9 b12        fetch b0 b4 b5      .        into the other half of the buffers
    MXU, VPU        b1 b3 b6 b7         b9 b12, output 0    b0 b4 b5, output 1

    logits of step 0, rows x keys       [ ##   ..   ..   ## ]        ## attended: a row sees the blocks of its own list

Tiling. The rows of a key/value head are the new tokens times the heads of the group, at most 128, filled up to a
multiple of 16. They share the union of their lists (`few_rows.lay_out`), so a block is fetched once, however many of
them attend it. A step takes up to 2048 keys of one head. The steps of all heads stand in one row, as many as the unions
need (dynamic grid), and every step starts the copies of the next one, also across heads, before it computes. The
running softmax (output, maximum, sum) stays in VMEM over the steps of a head; the last one divides and writes.

Mask. Each row has its list and the number of keys that it sees, [rows, top_k + 1]. A block's id is compared with the
numbers of the list, each spread over all lanes once a step; nothing is added up along lanes.

Memory. HBM: the cache as it lies, neither copied, padded nor transposed. That holds for head_dim a multiple of 128; XLA
lays out narrower arrays with another axis along the lanes and would copy them, so they are refused. SMEM: the unions,
4 bytes an entry. VMEM at 2048 keys, head_dim 128, bfloat16: two buffers of keys and values 2 MB; logits and weights
0.3 MB for 16 rows, 2.5 MB for 128.

Speed. By libtpu's static profile for a v6e a full step of 16 blocks of 128 keys takes about 1700 cycles for up to 16
rows, of which its 1 MB from memory takes 1110. The rest is latency, of two products, the maximum and exp2, one after
the other; so a step is long, though a short union fills only a part of it. Starting a block's two copies takes the
scalar unit some 27 cycles, without bounds checks; that bounds short blocks. A chip with two cores in one device (v5p)
uses one of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Arrays
from pallas_kernels.few_rows import join, lay_out, num_entries
from pallas_kernels.numerics import LOG2_E, NN, NT, OUT_OF_SIGHT, product, result

_LANES = 128
_ROW_MULTIPLE = 16  # rows of a register of bfloat16
_KEYS_PER_STEP = 2048
_STEP_BYTES = 24 << 20  # VMEM for two buffers of keys and values, and the logits of 128 rows
_MOST_NUMBERS = 1 << 17  # of blocks, steps and heads, in SMEM


def refuses(arrays: Arrays, top_k: int) -> str | None:
    """Why the kernel cannot do a call with these arrays, those of `attend`; None if it can."""
    query, key, value = arrays
    batch, kv_heads, _, block_size, _ = key.shape
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, got query.dtype={query.dtype}"
    multiple = 32 // query.dtype.itemsize
    if block_size % multiple:
        return f"the TPU decode kernel takes a block_size that is a multiple of {multiple}, got {block_size=}"
    for name, array in (("head_dim", key), ("value_head_dim", value)):
        if array.shape[4] % _LANES:
            return (
                f"the TPU decode kernel takes a {name} that is a multiple of {_LANES}, for XLA would copy the cache to "
                f"another layout, got {name}={array.shape[4]}"
            )
    columns = key.shape[4] + value.shape[4]
    step = max(block_size, _KEYS_PER_STEP) * (2 * columns * query.dtype.itemsize + 3 * 4 * 128)
    if step > _STEP_BYTES:
        sizes = f"{block_size=}, head_dim={key.shape[4]}, value_head_dim={value.shape[4]}"
        return f"the TPU decode kernel has {_STEP_BYTES} bytes for a step, but needs {step} for {sizes}"
    entries = num_entries(arrays, top_k)
    numbers = batch * kv_heads * (entries + -(-entries // _blocks_at_once(_KEYS_PER_STEP, block_size, entries)) + 2)
    if numbers > _MOST_NUMBERS:
        return f"the TPU decode kernel keeps {_MOST_NUMBERS} numbers of chosen blocks and steps, got {numbers}"
    return None


def _blocks_at_once(keys_per_step: int, block_size: int, entries: int) -> int:
    return max(1, min(keys_per_step // block_size, entries))


def attend(
    arrays: Arrays,
    indices: jax.Array,
    length: jax.Array,
    num_new: jax.Array,
    *,
    scale: float,
    keys_per_step: int = _KEYS_PER_STEP,
    interpret: Any = False,
) -> jax.Array:
    """softmax(scale q k^T) v of each query over the keys of its chosen blocks up to its own position.

    Source: FlashAttention-2 (arXiv 2307.08691), section 3, over a list of blocks.

    Args:
      arrays: query `[batch, queries, heads, head_dim]`, float32 or bfloat16, key `[batch, kv_heads, blocks, block_size,
        head_dim]` and value `[batch, kv_heads, blocks, block_size, value_head_dim]` of its dtype, finite numbers;
        queries times heads / kv_heads at most 128.
      indices: int32 `[batch, heads, queries, top_k]`, blocks of keys that the query sees, none twice in a list; -1 for
        none, anywhere.
      length: int32 `[batch]`, tokens of a row, the queries' own included.
      num_new: int32 `[batch]`: query t stands at position length - num_new + t; from num_new on queries are padding.
      scale: factor of the logits.
      keys_per_step: keys that a step takes, at least one block.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      `[batch, queries, heads, value_head_dim]` of query's dtype; zeros for a query with nothing to attend to.

    Raises:
      NotImplementedError: see `refuses`.
    """
    if (reason := refuses(arrays, indices.shape[3])) is not None:
        raise NotImplementedError(reason)
    query, key, value = arrays
    batch, kv_heads, _, block_size, head_dim = key.shape
    heads, value_head_dim = batch * kv_heads, value.shape[4]
    few = lay_out(arrays, indices, length, num_new, row_multiple=_ROW_MULTIPLE)
    rows, entries = few.query.shape[2], few.union.shape[2]
    stop = jnp.broadcast_to(few.stop[:, None, :, None], (*few.indices.shape[:3], 1))
    lists = jnp.concatenate([few.indices, stop], axis=3).reshape(heads, rows, -1)
    at_once = _blocks_at_once(keys_per_step, block_size, entries)

    # The steps of all heads in one row. A head without blocks has one step too, which writes its zeros.
    union_length = few.union_length.reshape(heads)
    steps = jnp.maximum(lax.div(union_length + (at_once - 1), jnp.int32(at_once)), 1)
    end = jnp.cumsum(steps, dtype=jnp.int32)
    step = lax.broadcasted_iota(jnp.int32, (heads * -(-entries // at_once), heads), 0)
    head_of_step = jnp.minimum((step >= end[None]).sum(1, dtype=jnp.int32), heads - 1)

    def own(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda step, head_ref, *_: (head_ref[step], 0, 0))

    output = pl.pallas_call(
        functools.partial(_kernel, at_once=at_once, block_size=block_size, entries=entries, scale=scale),
        out_shape=result((heads, rows, value_head_dim), query.dtype, query),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(end[-1],),
            in_specs=[
                own(rows, head_dim),
                own(rows, lists.shape[2]),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=own(rows, value_head_dim),
            scratch_shapes=[
                pltpu.VMEM((2, at_once * block_size, head_dim), key.dtype),
                pltpu.VMEM((2, at_once * block_size, value_head_dim), key.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((rows, value_head_dim), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=48 << 20,
            disable_bounds_checks=True,  # they take a fifth of the time; the interpreter makes them in the tests
        ),
        name="attend_few",
        interpret=interpret,
    )(
        head_of_step,
        end - steps,
        union_length,
        few.union.reshape(-1),
        few.query.reshape(heads, rows, head_dim),
        lists,
        key.reshape(heads, *key.shape[2:]),
        value.reshape(heads, *value.shape[2:]),
    )
    return join(output.reshape(batch, kv_heads, rows, value_head_dim), query)


def _kernel(
    head_ref: Any,  # SMEM [steps], the key/value head of each step, of batch * kv_heads
    first_ref: Any,  # SMEM [heads], first step of each head
    length_ref: Any,  # SMEM [heads], blocks of its union
    union_ref: Any,  # SMEM [heads * entries]
    query_ref: Any,  # [1, rows, head_dim]
    list_ref: Any,  # [1, rows, top_k + 1]: blocks, then how many keys the row sees
    key_hbm: Any,  # [heads, blocks, block_size, head_dim]
    value_hbm: Any,  # [heads, blocks, block_size, value_head_dim]
    output_ref: Any,  # [1, rows, value_head_dim]
    key_ref: Any,  # [2, at_once * block_size, head_dim], keys of this step and of the next one
    value_ref: Any,  # [2, at_once * block_size, value_head_dim]
    semaphores: Any,  # [2]
    accumulator_ref: Any,  # [rows, value_head_dim]
    largest_ref: Any,  # [rows, 1]
    total_ref: Any,  # [rows, 1]
    *,
    at_once: int,
    block_size: int,
    entries: int,
    scale: float,
) -> None:
    step, num_steps = pl.program_id(0), pl.num_programs(0)

    def span(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The head of a step, its first entry in the head's union, and how many blocks it has."""
        head = head_ref[step]
        first = (step - first_ref[head]) * at_once
        return head, first, jnp.clip(length_ref[head] - first, 0, at_once)

    def copies(step: jax.Array, place: Any) -> list[Any]:
        head, first, _ = span(step)
        block, slot = union_ref[head * entries + first + place], lax.rem(step, 2)
        keys = pl.ds(place * block_size, block_size)
        pairs = (key_hbm, key_ref), (value_hbm, value_ref)
        return [
            pltpu.make_async_copy(source.at[head, block], target.at[slot, keys], semaphores.at[slot])
            for source, target in pairs
        ]

    def fetch(step: jax.Array) -> None:
        def start(place: Any, carry: None = None) -> None:
            for copy in copies(step, place):
                copy.start()

        def start_all() -> None:  # without a loop it takes the scalar unit a third of the time
            for place in range(at_once):
                start(place)

        number = span(step)[2]
        lax.cond(number == at_once, start_all, lambda: lax.fori_loop(0, number, start, None))

    def wait(step: jax.Array) -> None:
        def wait_one(place: jax.Array, carry: None) -> None:
            for copy in copies(step, place):
                copy.wait()

        def wait_all() -> None:  # one copy of as many bytes
            slot = lax.rem(step, 2)
            for target in (key_ref, value_ref):
                pltpu.make_async_copy(target.at[slot], target.at[slot], semaphores.at[slot]).wait()

        number = span(step)[2]
        lax.cond(number == at_once, wait_all, lambda: lax.fori_loop(0, number, wait_one, None))

    @pl.when(step == 0)
    def _() -> None:
        value_ref[...] = jnp.zeros(value_ref.shape, value_ref.dtype)  # what is never fetched is multiplied by 0
        fetch(step)

    @pl.when(step + 1 < num_steps)
    def _() -> None:
        fetch(step + 1)

    head, first, number = span(step)

    @pl.when(first == 0)
    def _() -> None:
        accumulator_ref[...] = jnp.zeros(accumulator_ref.shape, jnp.float32)
        largest_ref[...] = jnp.full(largest_ref.shape, OUT_OF_SIGHT, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(number > 0)
    def _() -> None:
        is_seen = _visible(list_ref[0], union_ref, head * entries + first, number, at_once, block_size)
        wait(step)
        slot = lax.rem(step, 2)
        key, value = key_ref[slot], value_ref[slot]
        logits = jnp.where(is_seen, product(query_ref[0], key, NT) * (scale * LOG2_E), OUT_OF_SIGHT)
        largest = largest_ref[...]
        new_largest = jnp.maximum(largest, logits.max(1, keepdims=True))
        factor = jnp.exp2(largest - new_largest)
        weight = jnp.where(is_seen, jnp.exp2(logits - new_largest), 0)
        largest_ref[...] = new_largest
        total_ref[...] = total_ref[...] * factor + weight.sum(1, keepdims=True)
        accumulator_ref[...] = accumulator_ref[...] * factor + product(weight.astype(value.dtype), value, NN)

    @pl.when(first + at_once >= length_ref[head])
    def _() -> None:
        total = total_ref[...]
        output_ref[0] = (accumulator_ref[...] / jnp.where(total == 0, 1, total)).astype(output_ref.dtype)


def _visible(
    lists: jax.Array, union_ref: Any, first: jax.Array, number: jax.Array, at_once: int, block_size: int
) -> jax.Array:
    """Which keys of a step every row attends, bool `[rows, at_once * block_size]`; lists as in `_kernel`."""
    # A list's number in all lanes: comparing it with a block's id then takes no sum along lanes.
    *columns, stop = (jnp.broadcast_to(lists[:, k : k + 1], (lists.shape[0], _LANES)) for k in range(lists.shape[1]))
    width = math.lcm(block_size, _LANES)  # blocks that fill whole registers
    together, copies = width // block_size, width // _LANES
    parts = []
    for begin in range(0, at_once, together):
        column = lax.broadcasted_iota(jnp.int32, (lists.shape[0], width), 1)
        limit = jnp.zeros(column.shape, jnp.int32)  # a row sees the columns below it
        for place in range(begin, min(begin + together, at_once)):
            block = jnp.where(place < number, union_ref[first + jnp.minimum(place, number - 1)], -2)
            is_chosen = functools.reduce(jnp.logical_or, (blocks == block for blocks in columns))
            offset = (place - begin) * block_size
            seen = jnp.where(is_chosen, offset + stop - block * block_size, 0)
            limit = jnp.where(column >= offset, jnp.concatenate([seen] * copies, axis=1), limit)
        parts.append(column < limit)
    return jnp.concatenate(parts, axis=1)[:, : at_once * block_size]
