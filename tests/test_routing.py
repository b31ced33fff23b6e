"""The rules of the choice, one by one (S2, S3, S6, S8)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from tests import cases
from tests.backends import every_plain_backend

pytestmark = pytest.mark.usefixtures("strict_ranks")


def route(query, key, implementation, **options):
    """Indices `[queries, top_k]` of one head; query `[queries, head_dim]`, key `[keys, head_dim]`."""
    query, key = (jnp.asarray(x)[None, :, None] for x in (query, key))
    options = {"is_causal": True, "implementation": implementation} | options
    call = jax.jit(functools.partial(sparse_attn.route_moba, **options))
    return np.asarray(call(query, key).indices)[0, 0]


@every_plain_backend
def test_ties_go_to_the_lower_block_index_S3(implementation):
    indices = route(np.ones((24, 4)), np.ones((24, 4)), implementation, block_size=4, top_k=3)
    np.testing.assert_array_equal(indices[-1], [5, 0, 1])
    np.testing.assert_array_equal(indices[5], [1, 0, -1])
    indices = route(np.ones((24, 4)), np.ones((24, 4)), implementation, block_size=4, top_k=3, is_causal=False)
    np.testing.assert_array_equal(indices, np.broadcast_to([0, 1, 2], (24, 3)))


@every_plain_backend
def test_zeros_of_either_sign_tie_S3(implementation):
    key = np.array([0.0, -0.0, 0.0, -0.0], np.float32)[:, None]
    for sign in (1.0, -1.0):
        indices = route(np.full((4, 1), sign, np.float32), key, implementation, block_size=1, top_k=4, is_causal=False)
        np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(4), (4, 4)))


@every_plain_backend
def test_the_own_block_comes_first_then_the_others_by_falling_score_S2(implementation):
    means = np.array([1.0, 5.0, 3.0, 4.0, 2.0, -9.0])  # of six blocks of two keys
    key = np.repeat(means, 2)[:, None].astype(np.float32)
    indices = route(np.ones((12, 1), np.float32), key, implementation, block_size=2, top_k=4)
    np.testing.assert_array_equal(indices[10:], [[5, 1, 3, 2]] * 2)  # its own score is the worst
    np.testing.assert_array_equal(indices[4:6], [[2, 1, 0, -1]] * 2)
    np.testing.assert_array_equal(indices[:2], [[0, -1, -1, -1]] * 2)


@every_plain_backend
def test_the_own_block_counts_towards_top_k_S2(implementation):
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, 32, 8), np.float32)
    for top_k in (1, 2):
        indices = route(query, key, implementation, block_size=8, top_k=top_k)
        assert indices.shape == (32, top_k)
        np.testing.assert_array_equal(indices[:, 0], np.arange(32) // 8)


@every_plain_backend
def test_means_run_over_the_keys_that_are_there_S6(implementation):
    key = np.array([3.0, 3.0, 3.0, 3.0, 4.0], np.float32)[:, None]  # a tail of one key: mean 4, not 1
    indices = route(np.ones((1, 1), np.float32), key, implementation, block_size=4, top_k=1, is_causal=False)
    np.testing.assert_array_equal(indices, [[1]])


@every_plain_backend
def test_means_and_scores_of_bfloat16_are_float32_S8(implementation):
    # The means 1 and 1 + 2^-10 are one number in bfloat16, and so would be the scores.
    key = jnp.ones((16, 1), jnp.bfloat16).at[8].set(1 + 2**-7)
    indices = route(jnp.ones((1, 1), jnp.bfloat16), key, implementation, block_size=8, top_k=1, is_causal=False)
    np.testing.assert_array_equal(indices, [[1]])


@every_plain_backend
@pytest.mark.parametrize("is_causal", [True, False])
def test_top_k_at_or_above_the_number_of_blocks_is_dense_attention_S2(implementation, is_causal):
    case = cases.Case("dense", queries=30, keys=30, heads=4, kv_heads=2, top_k=4, is_causal=is_causal)
    arrays, _ = cases.make_inputs(case)
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    dense = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="xla")
    moba = functools.partial(sparse_attn.moba_attention, **case.options, implementation=implementation)
    output = jax.jit(moba)(query, key, value)
    cases.assert_close(output, dense, case.dtype)


@every_plain_backend
def test_top_k_one_attends_the_own_block_alone_S2(implementation):
    case = cases.Case("own_block", top_k=1)
    arrays, _ = cases.make_inputs(case)
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    moba = functools.partial(sparse_attn.moba_attention, **case.options, implementation=implementation)
    output = jax.jit(moba)(query, key, value)

    def in_blocks(array):
        return array.reshape(-1, case.block_size, *array.shape[2:])

    alone = jax.nn.dot_product_attention(*map(in_blocks, (query, key, value)), is_causal=True, implementation="xla")
    cases.assert_close(output, alone.reshape(output.shape), case.dtype)
