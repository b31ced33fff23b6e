"""The sparse path stays sparse: nothing of size queries x keys or queries x blocks, memory linear in the sequence.

Read off the compiled program, so nothing runs.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import sparse_attn

HEADS, HEAD_DIM, TOP_K = 2, 16, 4
SIZES = {"block_size": 16, "top_k": TOP_K, "is_causal": True}
LENGTHS = (8192, 16384)


@functools.cache
def compiled(num_tokens, *, with_gradients, is_packed=False):
    """The compiled program of one call."""
    array = jax.ShapeDtypeStruct((1, num_tokens, HEADS, HEAD_DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    segments = {"query_segment_ids": ids, "key_value_segment_ids": ids} if is_packed else {}
    attend = functools.partial(sparse_attn.moba_attention, **SIZES, implementation="xla")

    def call(query, key, value, segments):
        if not with_gradients:
            return attend(query, key, value, **segments)
        output, pull_back = jax.vjp(functools.partial(attend, **segments), query, key, value)
        return output, pull_back(output)

    return jax.jit(call).lower(array, array, array, segments).compile()


def largest_array(program):
    """Elements of the largest array anywhere in the program, loops included."""
    shapes = re.findall(r"\b(?:pred|[sufb]f?\d+)\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


every_pass = pytest.mark.parametrize("with_gradients", [False, True], ids=["forward", "backward"])


@every_pass
@pytest.mark.parametrize("is_packed", [False, True], ids=["full", "packed"])
def test_no_array_grows_with_the_square_of_the_sequence(with_gradients, is_packed):
    num_tokens = LENGTHS[-1]
    program = compiled(num_tokens, with_gradients=with_gradients, is_packed=is_packed)
    # queries x blocks is the smaller of the two; of one head: 16384 * 1024. The pairs take 2 * 16384 * 4 rows of 16.
    assert largest_array(program) < num_tokens * (num_tokens // SIZES["block_size"])


@every_pass
def test_twice_the_sequence_takes_at_most_a_little_over_twice_the_memory(with_gradients):
    sizes = [compiled(n, with_gradients=with_gradients).memory_analysis().temp_size_in_bytes for n in LENGTHS]
    assert sizes[1] < 2.2 * sizes[0]


@every_pass
def test_working_memory_is_a_small_multiple_of_the_arrays(with_gradients):
    num_tokens = LENGTHS[-1]
    size = compiled(num_tokens, with_gradients=with_gradients).memory_analysis().temp_size_in_bytes
    one_array = 4 * num_tokens * HEADS * HEAD_DIM
    assert size < 8 * TOP_K * one_array


def test_the_dense_definition_would_fail_these_tests():
    array = jax.ShapeDtypeStruct((1, 512, HEADS, HEAD_DIM), jnp.float32)
    attend = functools.partial(sparse_attn.moba_attention, **SIZES, implementation="reference")
    program = jax.jit(attend).lower(array, array, array).compile()
    assert largest_array(program) >= 512 * 512
