"""Gradients against the oracle's hand-written ones, and against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import sparse_attn
from sparse_attn.attend import derivatives
from sparse_attn.attend.backends import XLA, resolve
from sparse_attn.attend.choice import PerQuery
from tests import attend, cases, oracle
from tests.backends import BACKENDS, every_backend, every_plain_backend
from tests.test_attention import case_for, compiled, inputs, select

pytestmark = pytest.mark.usefixtures("strict_ranks")


@every_plain_backend
def test_gradients_equal_finite_differences(implementation):
    case = cases.Case("numeric", batch=1, queries=7, keys=10, heads=2, kv_heads=1, head_dim=3, block_size=3)
    arrays, _, foreign = inputs(case)

    def attend(query, key, value):
        return sparse_attn.block_sparse_attention(
            query,
            key,
            value,
            select(case, foreign),
            is_causal=True,
            implementation=implementation,
            return_residual=True,
        )[0]

    # float32 differences over steps of 1e-2 are right to about the square of the step and the rounding over the step.
    check_grads(jax.jit(attend), list(arrays.values())[:3], order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


@every_plain_backend
def test_the_gradient_of_the_log_sum_exp_equals_finite_differences(implementation):
    case = cases.Case("numeric", batch=1, queries=10, keys=10, heads=2, kv_heads=1, head_dim=3, block_size=3)
    arrays, _, _ = inputs(case)
    indices = np.broadcast_to([0, 1], (1, 2, 10, 2)).astype(np.int32)  # every query sees the first key

    def log_sum_exp(query, key, value):
        return sparse_attn.block_sparse_attention(
            query,
            key,
            value,
            select(case, indices),
            is_causal=True,
            implementation=implementation,
            return_residual=True,
        )[1]

    check_grads(jax.jit(log_sum_exp), list(arrays.values())[:3], order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


@every_plain_backend
@pytest.mark.parametrize("name", ["lengths", "mixed_segments"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients_S7(name, implementation):
    case = next(case for case in cases.CASES if case.name == name)
    arrays, sequences, foreign = inputs(case)
    poisoned = dict(arrays)
    for array, side in (("query", "query"), ("key", "key_value"), ("value", "key_value")):
        is_padding = np.arange(arrays[array].shape[1]) >= sequences[f"{side}_seq_lengths"][:, None]
        assert is_padding.any()
        poisoned[array] = np.where(is_padding[..., None, None], np.float32(np.nan), arrays[array])
    call = compiled(case, implementation)
    actual, clean = (call(*x.values(), foreign, sequences)[1] for x in (poisoned, arrays))
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(actual))


@every_plain_backend
def test_gradients_are_exactly_zero_for_keys_after_the_query_S2(implementation):
    case = cases.CASES[0]
    arrays, sequences, foreign = inputs(case)
    middle = case.queries // 2 - 3
    d_output = np.array(arrays["d_output"])
    d_output[:, np.arange(case.queries) != middle] = 0  # the loss reads one query
    query, key, value, _ = arrays.values()
    call = compiled(case, implementation)
    _, (_, (d_query, d_key, d_value)), _ = call(query, key, value, d_output, foreign, sequences)
    np.testing.assert_array_equal(np.asarray(d_query)[:, np.arange(case.queries) != middle], 0)
    for gradient in (d_key, d_value):
        np.testing.assert_array_equal(np.asarray(gradient)[:, middle + 1 :], 0)
        assert np.abs(gradient[:, middle]).min() > 0  # every query sees itself


@pytest.mark.parametrize("case", cases.LONG, ids=str)
def test_long_sequences_equal_the_reference_in_choice_output_and_gradients(case):
    arrays, sequences = cases.make_inputs(case)

    @functools.partial(jax.jit, static_argnames="implementation")
    def call(query, key, value, d_output, sequences, implementation):
        options = {**case.options, "implementation": implementation, **sequences}
        indices = sparse_attn.route_moba(query, key, **options).indices
        output, pull_back = jax.vjp(functools.partial(sparse_attn.moba_attention, **options), query, key, value)
        return indices, (output, pull_back(d_output))

    chosen, actual = call(*arrays.values(), sequences, implementation="xla")
    expected_choice, expected = call(*arrays.values(), sequences, implementation="reference")
    np.testing.assert_array_equal(chosen, expected_choice)
    jax.tree.map(lambda a, e: cases.assert_close(a, e, case.dtype), actual, expected)


@every_backend
def test_gradients_of_parts_of_the_keys_add_up_to_those_of_all_of_them(backend):
    """What shards do that attend queries of others: each from its own keys and the results over all keys."""
    case = case_for(backend, "lengths")
    arrays, sequences, foreign = inputs(case)
    query, key, value, d_output = arrays.values()
    scale = case.head_dim**-0.5

    chosen = resolve(BACKENDS[backend]())
    prepared, blocks = attend.prepare(case, query, key, value, sequences)
    results = jax.jit(derivatives.attend, static_argnums=(0, 3))(XLA, prepared, PerQuery(foreign, blocks), scale)

    @jax.jit
    def gradients(indices):
        cotangents = d_output.astype(results[0].dtype), jnp.zeros_like(results[1])
        return derivatives.pull_back(chosen, scale, prepared, PerQuery(indices, blocks), results, cotangents)

    parts = (gradients(np.where(is_part, foreign, -1)) for is_part in (foreign % 2 == 0, foreign % 2 == 1))
    actual = jax.tree.map(jnp.add, *parts)
    mask = attend.mask_of(case, foreign, sequences)
    _, expected = oracle.attention(query, key, value, mask, scale=scale, d_output=d_output)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        cases.assert_close(gradient, expected_gradient, case.dtype)
