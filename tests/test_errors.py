"""Bad arguments: a ValueError at trace time that names the argument and what it holds (S10)."""

import functools

import jax
import jax.numpy as jnp
import pytest

import sparse_attn
from sparse_attn import BlockSelection

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 4, 2, 4
QUERY = jax.ShapeDtypeStruct((BATCH, TOKENS, HEADS, HEAD_DIM), jnp.float32)
KEY = jax.ShapeDtypeStruct((BATCH, TOKENS, KV_HEADS, HEAD_DIM), jnp.float32)
LENGTHS = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
SEGMENTS = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
INDICES = jax.ShapeDtypeStruct((BATCH, HEADS, TOKENS, 2), jnp.int32)


SIZES = {"block_size": 4, "top_k": 2, "is_causal": True}


def like(array, shape=None, dtype=None):
    return jax.ShapeDtypeStruct(shape or array.shape, dtype or array.dtype)


def trace(function, arrays, options):
    """Traces without running: arrays are abstract, options static."""
    abstract = {name: value for name, value in options.items() if isinstance(value, jax.ShapeDtypeStruct)}
    static = {name: value for name, value in options.items() if name not in abstract}
    return jax.eval_shape(functools.partial(function, **static), *arrays, **abstract)


def moba(query=QUERY, key=KEY, value=KEY, **options):
    return trace(sparse_attn.moba_attention, (query, key, value), SIZES | options)


def route(query=QUERY, key=KEY, **options):
    return trace(sparse_attn.route_moba, (query, key), SIZES | options)


def attend(query=QUERY, key=KEY, value=KEY, indices=INDICES, block_size=4, **options):
    def call(query, key, value, indices, **options):
        selection = BlockSelection(indices, block_size=block_size, num_blocks=2)
        return sparse_attn.block_sparse_attention(query, key, value, selection, **options)

    return trace(call, (query, key, value, indices), {"is_causal": True} | options)


SHARED = {  # name of the case: (arguments, words that the message must hold)
    "query of rank 3": ({"query": like(QUERY, (TOKENS, HEADS, HEAD_DIM))}, ["query", "(8, 4, 4)"]),
    "query of integers": ({"query": like(QUERY, dtype=jnp.int32)}, ["query", "int32"]),
    "no queries": ({"query": like(QUERY, (BATCH, 0, HEADS, HEAD_DIM))}, ["query", "(2, 0, 4, 4)"]),
    "key of rank 3": ({"key": like(KEY, (TOKENS, KV_HEADS, HEAD_DIM))}, ["key", "(8, 2, 4)"]),
    "key of another dtype": ({"key": like(KEY, dtype=jnp.bfloat16)}, ["key", "bfloat16", "float32"]),
    "key of another batch": ({"key": like(KEY, (3, TOKENS, KV_HEADS, HEAD_DIM))}, ["key", "(3, 8, 2, 4)"]),
    "key of another head_dim": ({"key": like(KEY, (BATCH, TOKENS, KV_HEADS, 5))}, ["key", "(2, 8, 2, 5)"]),
    "no keys": ({"key": like(KEY, (BATCH, 0, KV_HEADS, HEAD_DIM))}, ["key", "(2, 0, 2, 4)"]),
    "heads not a multiple": ({"key": like(KEY, (BATCH, TOKENS, 3, HEAD_DIM))}, ["key", "(2, 8, 3, 4)"]),
    "more kv_heads than heads": ({"key": like(KEY, (BATCH, TOKENS, 8, HEAD_DIM))}, ["key", "(2, 8, 8, 4)"]),
    "block_size zero": ({"block_size": 0}, ["block_size", "0", "at least 1"]),
    "block_size negative": ({"block_size": -4}, ["block_size", "-4"]),
    "query lengths of another batch": ({"query_seq_lengths": like(LENGTHS, (3,))}, ["query_seq_lengths", "3"]),
    "query lengths of reals": (
        {"query_seq_lengths": like(LENGTHS, dtype=jnp.float32)},
        ["query_seq_lengths", "float32"],
    ),
    "key lengths of rank 2": ({"key_value_seq_lengths": like(LENGTHS, (2, 1))}, ["key_value_seq_lengths", "2, 1"]),
    "query ids alone": ({"query_segment_ids": SEGMENTS}, ["key_value_segment_ids", "None"]),
    "key ids alone": ({"key_value_segment_ids": SEGMENTS}, ["query_segment_ids", "None"]),
    "query ids of another length": (
        {"query_segment_ids": like(SEGMENTS, (BATCH, 9)), "key_value_segment_ids": SEGMENTS},
        ["query_segment_ids", "2, 9"],
    ),
    "key ids of another length": (
        {"query_segment_ids": SEGMENTS, "key_value_segment_ids": like(SEGMENTS, (BATCH, 9))},
        ["key_value_segment_ids", "2, 9"],
    ),
    "key ids of reals": (
        {"query_segment_ids": SEGMENTS, "key_value_segment_ids": like(SEGMENTS, dtype=jnp.float32)},
        ["key_value_segment_ids", "float32"],
    ),
    "unknown implementation": ({"implementation": "cuda"}, ["implementation", "cuda", "xla", "reference"]),
}
ROUTING = {
    "block_size real": ({"block_size": 4.0}, ["block_size", "4.0"]),
    "top_k zero": ({"top_k": 0}, ["top_k", "0", "at least 1"]),
    "top_k negative": ({"top_k": -1}, ["top_k", "-1"]),
    "top_k real": ({"top_k": 2.0}, ["top_k", "2.0"]),
    "top_k of truth": ({"top_k": True}, ["top_k", "True"]),
}
VALUES = {
    "value of another shape": ({"value": like(KEY, (BATCH, 7, KV_HEADS, HEAD_DIM))}, ["value", "(2, 7, 2, 4)"]),
    "value of another dtype": ({"value": like(KEY, dtype=jnp.float16)}, ["value", "float16"]),
    "value of rank 3": ({"value": like(KEY, (TOKENS, KV_HEADS, HEAD_DIM))}, ["value", "(8, 2, 4)"]),
}
SELECTIONS = {
    "indices of rank 3": ({"indices": like(INDICES, (BATCH, HEADS, TOKENS))}, ["selection", "(2, 4, 8)"]),
    "indices of kv_heads": ({"indices": like(INDICES, (BATCH, KV_HEADS, TOKENS, 2))}, ["selection", "(2, 2, 8, 2)"]),
    "indices of reals": ({"indices": like(INDICES, dtype=jnp.float32)}, ["selection", "float32"]),
    "no indices": ({"indices": like(INDICES, (BATCH, HEADS, TOKENS, 0))}, ["selection", "(2, 4, 8, 0)"]),
}
TABLES = {moba: (SHARED, ROUTING, VALUES), route: (SHARED, ROUTING), attend: (SHARED, VALUES, SELECTIONS)}
CALLS = [
    pytest.param(function, *case, id=f"{function.__name__}: {name}")
    for function, tables in (
        (moba, (SHARED, ROUTING, VALUES)),
        (route, (SHARED, ROUTING)),
        (attend, (SHARED, VALUES, SELECTIONS)),
    )
    for table in tables
    for name, case in table.items()
]


@pytest.mark.parametrize(("function", "arguments", "words"), CALLS)
def test_a_bad_argument_is_a_value_error_that_names_it_S10(function, arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked one by one
        function(**arguments)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("function", [moba, route, attend])
def test_the_defaults_of_these_tests_are_accepted(function):
    assert jax.tree.leaves(function())[0].shape[0] == BATCH
    assert function(query_segment_ids=SEGMENTS, key_value_segment_ids=SEGMENTS, query_seq_lengths=LENGTHS) is not None


@pytest.mark.parametrize(
    ("implementation", "platform", "word"), [("pallas", "tpu", "head_dim=4"), ("mosaic", "cuda", "float32|jax 0.11")]
)
def test_an_implementation_that_cannot_do_the_call_says_why_S10(implementation, platform, word):
    attend = functools.partial(sparse_attn.moba_attention, **SIZES, implementation=implementation)
    with pytest.raises(NotImplementedError, match=word):
        jax.jit(attend).trace(QUERY, KEY, KEY).lower(lowering_platforms=(platform,))


def test_kernels_for_another_platform_say_so_when_the_program_is_compiled():
    attend = functools.partial(sparse_attn.moba_attention, block_size=16, top_k=1, is_causal=True)
    query = jnp.ones((1, 32, 1, 64))
    with pytest.raises(NotImplementedError, match=r"TritonKernels, MosaicKernels, TpuKernels cannot run on cpu.*'xla'"):
        attend(query, query, query, implementation="pallas")
