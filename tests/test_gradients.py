"""Gradients against the oracle's hand-written ones, and against finite differences."""

import functools

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

import sparse_attn
from tests import cases, oracle
from tests.test_attention import every_case, every_implementation, inputs, select
from tests.test_attention import expected as routed

pytestmark = pytest.mark.usefixtures("strict_ranks")

FOREIGN = ("ragged_tail", "grouped_heads", "mixed_segments", "all_see_all_mixed", "bfloat16")  # cases with any ids


@functools.cache
def compiled_moba(case, implementation):
    """A function: query, key, value, d_output, sequence arguments -> output, gradients."""

    @jax.jit
    def call(query, key, value, d_output, sequences):
        options = {**case.options, "scale": case.scale, "implementation": implementation, **sequences}
        output, pull_back = jax.vjp(functools.partial(sparse_attn.moba_attention, **options), query, key, value)
        return output, pull_back(d_output)

    return call


def assert_gradients_close(case, gradients, expected):
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        cases.assert_close(gradient, expected_gradient, case.dtype)


@every_implementation
@every_case
def test_gradients_equal_the_oracle_s_and_vanish_for_empty_rows_S3_S9(case, implementation):
    arrays, sequences, _ = inputs(case)
    query, key, value, d_output = arrays.values()
    _, gradients = compiled_moba(case, implementation)(query, key, value, d_output, sequences)
    options = {"scale": case.scale, "d_output": d_output, **case.options, **sequences}
    assert_gradients_close(case, gradients, oracle.moba(query, key, value, **options)[1])
    indices, *_ = routed(case)
    is_empty = (indices < 0).all(axis=-1).swapaxes(1, 2)  # [batch, queries, heads]
    np.testing.assert_array_equal(np.asarray(gradients[0])[is_empty], 0)


@every_implementation
@pytest.mark.parametrize("case", [case for case in cases.CASES if case.name in FOREIGN], ids=str)
def test_gradients_over_any_block_ids_equal_the_oracle_s(case, implementation):
    arrays, sequences, foreign = inputs(case)
    query, key, value, d_output = arrays.values()

    @jax.jit
    def call(query, key, value, d_output, foreign, sequences):
        options = {"is_causal": case.is_causal, "scale": case.scale, "implementation": implementation, **sequences}
        attend = functools.partial(sparse_attn.block_sparse_attention, selection=select(case, foreign), **options)
        return jax.vjp(attend, query, key, value)[1](d_output)

    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    mask = oracle.attention_mask(foreign, **reach, **sequences)
    _, expected = oracle.attention(query, key, value, mask, scale=case.scale, d_output=d_output)
    assert_gradients_close(case, call(query, key, value, d_output, foreign, sequences), expected)


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
@pytest.mark.parametrize("name", ["lengths", "mixed_segments"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients_S7(name, implementation):
    case = next(case for case in cases.CASES if case.name == name)
    arrays, sequences, _ = inputs(case)
    poisoned = dict(arrays)
    for array, side in (("query", "query"), ("key", "key_value"), ("value", "key_value")):
        is_padding = np.arange(arrays[array].shape[1]) >= sequences[f"{side}_seq_lengths"][:, None]
        assert is_padding.any()
        poisoned[array] = np.where(is_padding[..., None, None], np.float32(np.nan), arrays[array])
    call = compiled_moba(case, implementation)
    actual, clean = (call(*x.values(), sequences) for x in (poisoned, arrays))
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(actual))


@every_implementation
def test_gradients_are_exactly_zero_for_keys_after_the_query_S2(implementation):
    case = cases.CASES[0]
    arrays, sequences, _ = inputs(case)
    middle = case.queries // 2 - 3
    d_output = np.array(arrays["d_output"])
    d_output[:, np.arange(case.queries) != middle] = 0  # the loss reads one query
    query, key, value, _ = arrays.values()
    _, (d_query, d_key, d_value) = compiled_moba(case, implementation)(query, key, value, d_output, sequences)
    np.testing.assert_array_equal(np.asarray(d_query)[:, np.arange(case.queries) != middle], 0)
    for gradient in (d_key, d_value):
        np.testing.assert_array_equal(np.asarray(gradient)[:, middle + 1 :], 0)
        assert np.abs(gradient[:, middle]).min() > 0  # every query sees itself


@pytest.mark.parametrize("case", cases.LONG, ids=str)
def test_long_sequences_equal_the_reference_in_choice_output_and_gradients(case):
    arrays, sequences = cases.make_inputs(case)
    query, key, _, _ = arrays.values()
    chosen = {}
    for implementation in ("reference", "xla"):
        route = functools.partial(sparse_attn.route_moba, **case.options, implementation=implementation)
        chosen[implementation] = jax.jit(route)(query, key, **sequences).indices
    np.testing.assert_array_equal(chosen["xla"], chosen["reference"])
    actual, expected = (compiled_moba(case, name)(*arrays.values(), sequences) for name in ("xla", "reference"))
    jax.tree.map(lambda a, e: cases.assert_close(a, e, case.dtype), actual, expected)
