"""What people pass in: NumPy numbers, lists, wide ids, sizes beyond what exists, strict settings of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn import BlockSelection, block_sparse_attention, moba_attention, route_moba, sliding_window_attention
from sparse_attn.nn import KeyConv, MoBAAttention, SlidingWindowAttention
from sparse_attn.systems.sla import SLA
from sparse_attn.systems.xattention import XAttention
from tests import cases, oracle
from tests.every_system import NAMES, TOKENS, every_system
from tests.sharded import output_and_gradients

CASE = cases.Case("input", batch=2, queries=20, keys=20, heads=4, kv_heads=2, head_dim=4, block_size=4, top_k=2)
moba = functools.partial(moba_attention, block_size=4, top_k=2, is_causal=True)


def draw(case=CASE, seed=0):
    arrays, _ = cases.make_inputs(case, seed)
    return [arrays[name] for name in ("query", "key", "value")]


def test_numpy_integers_are_sizes_and_lists_are_arrays():
    number, (query, key, value) = np.int64, draw()
    lengths = jnp.array([20, 7])
    expected = jax.jit(lambda: moba(query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths))()
    sizes = {"block_size": number(4), "top_k": number(2), "scale": np.float32(0.5)}
    lists = {"query_seq_lengths": [20, 7], "key_value_seq_lengths": (20, 7)}
    output = jax.jit(lambda: moba(query.tolist(), key, value.tolist(), **sizes, **lists))()
    np.testing.assert_array_equal(output, expected)
    window = functools.partial(sliding_window_attention, window_size=number(4))
    assert jax.eval_shape(window, query, key, value).shape == query.shape
    tokens = jnp.ones((2, 20, 16))
    options = {"key_conv_width": number(3), "block_size": number(4), "top_k": number(2)}
    for module in (
        KeyConv(2, 4, number(3), rngs=nnx.Rngs(0)),
        MoBAAttention(in_features=number(16), num_heads=number(2), **options, rngs=nnx.Rngs(0)),
        SlidingWindowAttention(in_features=16, num_heads=2, window_size=number(4), rngs=nnx.Rngs(0)),
    ):
        inputs = key if isinstance(module, KeyConv) else tokens
        assert nnx.eval_shape(lambda module, inputs: module(inputs), module, inputs).shape == inputs.shape


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64"])
def test_ids_of_any_integer_dtype_keep_documents_apart(dtype):
    last = np.iinfo(dtype).max
    ids = np.repeat(np.array([0, last, last - 1, 5], dtype), 5)[None].repeat(2, 0)
    if dtype == "int64":
        ids[ids == 5] = 2**32  # 0 in 32 bits
    arrays = draw()
    mask = oracle.attention_mask(
        oracle.route(*arrays[:2], block_size=4, top_k=2, query_segment_ids=ids, key_value_segment_ids=ids)[0],
        num_keys=20, block_size=4, query_segment_ids=ids, key_value_segment_ids=ids,
    )  # fmt: skip
    with jax.enable_x64(dtype == "int64"):
        output = jax.jit(lambda *arrays: moba(*arrays, query_segment_ids=ids, key_value_segment_ids=ids))(*arrays)
        window = jax.jit(lambda *arrays: sliding_window_attention(*arrays, window_size=20, segment_ids=ids))(*arrays)
    cases.assert_close(output, oracle.attention(*arrays, mask), "float32")
    causal = np.tri(20, dtype=bool) & (ids[:, None, :, None] == ids[:, None, None])
    cases.assert_close(window, oracle.attention(*arrays, np.broadcast_to(causal, (2, 4, 20, 20))), "float32")


def test_ids_that_do_not_fit_are_refused_rather_than_cut():
    ids = np.zeros((2, 20), np.int64)
    ids[:, 10:] = 2**32
    with pytest.raises(ValueError, match="query_segment_ids must lie between"):
        moba(*draw(), query_segment_ids=ids, key_value_segment_ids=ids)
    with pytest.raises(ValueError, match="segment_ids must lie between"):  # without a batch axis
        moba(*(array[0] for array in draw()), segment_ids=ids[0])


def test_systems_name_values_of_another_head_dim():
    query, key, value = draw()
    for attention in (XAttention(block_size=4, stride=2), SLA(query_block_size=4, key_block_size=4)):
        arrays = () if isinstance(attention, XAttention) else (np.zeros((4, 4)), np.zeros(4))
        with pytest.raises(ValueError, match="value must be shaped like key"):
            attention(query, key, value[..., :3], *arrays)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32"])
def test_dtypes_that_are_not_worked_with_are_named(dtype):
    arrays = [jnp.asarray(array).astype(dtype) for array in draw()]
    with pytest.raises(ValueError, match=f"query must have a dtype of .*{dtype}"):
        moba(*arrays)
    with pytest.raises(ValueError, match=f"query must have a dtype of .*{dtype}"):
        sliding_window_attention(*arrays, window_size=4)


def test_an_empty_batch_is_named():
    with pytest.raises(ValueError, match="query must not be empty"):
        moba(*(array[:0] for array in draw()))


def test_a_block_chosen_twice_counts_once():
    query, key, value = draw()
    random = np.random.default_rng(1)
    indices = random.integers(-1, 5, (2, 4, 20, 9)).astype(np.int32)  # more entries than blocks, most of them twice
    mask = oracle.attention_mask(indices, num_keys=20, block_size=4)
    d_output = random.standard_normal(query.shape).astype(np.float32)
    output, gradients = oracle.attention(query, key, value, mask, d_output=d_output)
    selection = BlockSelection(jnp.asarray(indices), block_size=4, num_blocks=5)
    for implementation in ("reference", "xla"):
        attend = functools.partial(
            block_sparse_attention, selection=selection, is_causal=True, implementation=implementation
        )
        actual, actual_gradients = jax.jit(lambda *x, f=attend: (f(*x), jax.vjp(f, *x)[1](d_output)))(query, key, value)
        cases.assert_close(actual, output, "float32")
        for gradient, expected in zip(actual_gradients, gradients, strict=True):
            cases.assert_close(gradient, expected, "float32")


def temporaries(**options):
    shape = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32)
    program = jax.jit(functools.partial(moba, **options)).lower(shape, shape, shape)
    return program.compile().memory_analysis().temp_size_in_bytes


def test_sizes_beyond_what_exists_take_no_more_room_and_change_nothing():
    assert temporaries(block_size=64, top_k=65536) <= temporaries(block_size=64, top_k=8)
    assert temporaries(block_size=65536, top_k=3) <= temporaries(block_size=512, top_k=3)
    arrays = draw()
    jax.eval_shape(functools.partial(moba, top_k=10**9), *arrays)
    np.testing.assert_array_equal(moba(*arrays, top_k=99), moba(*arrays, top_k=5))
    causal = np.broadcast_to(np.tri(20, dtype=bool), (2, 4, 20, 20))
    cases.assert_close(moba(*arrays, block_size=10**6, top_k=1), oracle.attention(*arrays, causal), "float32")
    assert route_moba(*arrays[:2], block_size=4, top_k=9, is_causal=True).indices.shape[-1] == 9


def test_key_lengths_alone_are_those_of_causal_self_attention():
    query, key, value = draw()
    lengths = jnp.array([20, 11])

    @jax.jit
    def run(**options):
        return moba(query, key, value, key_value_seq_lengths=lengths, **options)

    np.testing.assert_array_equal(run(), run(query_seq_lengths=lengths))
    theirs = jax.nn.dot_product_attention(query, key, value, is_causal=True, key_value_seq_lengths=lengths)
    attend = jax.jit(functools.partial(moba, top_k=5))
    ours = attend(query, key, value, key_value_seq_lengths=lengths)
    cases.assert_close(ours[1, :11], theirs[1, :11], "float32")
    # Without causality every query is real: their number says nothing of the keys.
    across = jax.jit(functools.partial(moba, is_causal=False))(query, key, value, key_value_seq_lengths=lengths)
    assert np.abs(across[1, 11:]).min() > 0


@pytest.mark.parametrize("name", [*NAMES, "window"])
def test_a_caller_may_be_strict_about_dtypes_and_ranks(name):
    query, key, value = (jnp.ones((1, TOKENS, heads, 8), jnp.bfloat16) for heads in (4, 2, 2))
    functions = every_system(query, key) | {"window": functools.partial(sliding_window_attention, window_size=8)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(output_and_gradients(functions[name]), query, key, value)
