"""Gradients against the oracle's hand-written ones, and against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import sparse_attn
from tests import cases, oracle
from tests.test_attention import every_case, every_implementation, inputs, select

pytestmark = pytest.mark.usefixtures("strict_ranks")


@functools.cache
def gradient_function(case, implementation):
    """Compiled: arrays, foreign ids, sequence arguments -> the gradients of MoBA, and those over the foreign ids."""

    @jax.jit
    def call(query, key, value, d_output, foreign, sequences):
        options = {"is_causal": case.is_causal, "scale": case.scale, "implementation": implementation, **sequences}
        sizes = {"block_size": case.block_size, "top_k": case.top_k}
        moba = functools.partial(sparse_attn.moba_attention, **sizes, **options)
        attend = functools.partial(sparse_attn.block_sparse_attention, selection=select(case, foreign), **options)
        return tuple(jax.vjp(f, query, key, value)[1](d_output) for f in (moba, attend))

    return call


@functools.cache
def expected(case):
    """The oracle's gradients of both."""
    arrays, sequences, foreign = inputs(case)
    query, key, value, d_output = arrays.values()
    options = {"scale": case.scale, "d_output": d_output}
    _, of_moba = oracle.moba(query, key, value, **case.options, **options, **sequences)
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    mask = oracle.attention_mask(foreign, **reach, **sequences)
    return of_moba, oracle.attention(query, key, value, mask, **options)[1]


@every_implementation
@every_case
def test_gradients_equal_the_oracle_s(case, implementation):
    arrays, sequences, foreign = inputs(case)
    actual = gradient_function(case, implementation)(*arrays.values(), foreign, sequences)
    for gradients, oracle_gradients in zip(actual, expected(case), strict=True):
        for gradient, oracle_gradient in zip(gradients, oracle_gradients, strict=True):
            assert gradient.dtype == cases.as_dtype(case.dtype)
            cases.assert_close(gradient, oracle_gradient, case.dtype)


@every_implementation
def test_gradients_equal_finite_differences(implementation):
    case = cases.Case("numeric", batch=1, queries=7, keys=10, heads=2, kv_heads=1, head_dim=3, block_size=3)
    arrays, _, foreign = inputs(case)

    def attend(query, key, value):
        return sparse_attn.block_sparse_attention(
            query, key, value, select(case, foreign), implementation=implementation, return_residual=True
        )[0]

    # float32 differences over steps of 1e-2 are right to about the square of the step and the rounding over the step.
    check_grads(jax.jit(attend), list(arrays.values())[:3], order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


@every_implementation
def test_the_gradient_of_the_log_sum_exp_equals_finite_differences(implementation):
    case = cases.Case("numeric", batch=1, queries=10, keys=10, heads=2, kv_heads=1, head_dim=3, block_size=3)
    arrays, _, _ = inputs(case)
    indices = np.broadcast_to([0, 1], (1, 2, 10, 2)).astype(np.int32)  # every query sees the first key

    def log_sum_exp(query, key, value):
        return sparse_attn.block_sparse_attention(
            query, key, value, select(case, indices), implementation=implementation, return_residual=True
        )[1]

    check_grads(jax.jit(log_sum_exp), list(arrays.values())[:3], order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


@every_implementation
def test_rows_with_nothing_to_attend_to_have_zero_gradients_S9(implementation):
    for name in ("more_queries", "lengths", "mixed_segments"):
        case = next(case for case in cases.CASES if case.name == name)
        arrays, sequences, foreign = inputs(case)
        indices, _ = oracle.route(arrays["query"], arrays["key"], **case.options, **sequences)
        is_empty = (indices < 0).all(axis=-1).swapaxes(1, 2)  # [batch, queries, heads]
        assert is_empty.any()
        d_query, _, _ = gradient_function(case, implementation)(*arrays.values(), foreign, sequences)[0]
        np.testing.assert_array_equal(np.asarray(d_query)[is_empty], 0)


@every_implementation
@pytest.mark.parametrize("name", ["lengths", "mixed_segments", "all_see_all_mixed"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients_S7(name, implementation):
    case = next(case for case in cases.CASES if case.name == name)
    arrays, sequences, foreign = inputs(case)
    poisoned = dict(arrays)
    for array, side in (("query", "query"), ("key", "key_value"), ("value", "key_value")):
        is_padding = np.arange(arrays[array].shape[1]) >= sequences[f"{side}_seq_lengths"][:, None]
        assert is_padding.any()
        poisoned[array] = np.where(is_padding[..., None, None], np.float32(np.nan), arrays[array])
    actual = gradient_function(case, implementation)(*poisoned.values(), foreign, sequences)
    clean = gradient_function(case, implementation)(*arrays.values(), foreign, sequences)
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    moba = functools.partial(sparse_attn.moba_attention, **case.options, implementation=implementation, **sequences)
    output = jax.jit(moba)(*(jnp.asarray(poisoned[name]) for name in ("query", "key", "value")))
    cases.assert_close(output, oracle.moba(*list(arrays.values())[:3], **case.options, **sequences), case.dtype)


@every_implementation
def test_gradients_are_exactly_zero_for_keys_after_the_query_S2(implementation):
    case = cases.CASES[0]
    arrays, sequences, foreign = inputs(case)
    middle = case.queries // 2 - 3
    d_output = np.array(arrays["d_output"])
    d_output[:, np.arange(case.queries) != middle] = 0  # the loss reads one query
    actual = gradient_function(case, implementation)(
        arrays["query"], arrays["key"], arrays["value"], d_output, foreign, sequences
    )
    for d_query, d_key, d_value in actual:
        np.testing.assert_array_equal(np.asarray(d_query)[:, np.arange(case.queries) != middle], 0)
        for gradient in (d_key, d_value):
            np.testing.assert_array_equal(np.asarray(gradient)[:, middle + 1 :], 0)
    assert np.abs(actual[0][2][:, middle]).min() > 0  # MoBA: every query sees itself
