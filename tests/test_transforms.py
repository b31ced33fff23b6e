"""jit, vmap, grad, remat and scan, alone and inside one another, give what the plain calls give."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from tests import cases, oracle
from tests.backends import every_plain_backend

CASE = cases.Case("transforms", batch=1, queries=24, keys=24, heads=2, kv_heads=1, head_dim=4, block_size=4, exact=True)
MIXED = dataclasses.replace(CASE, name="transforms_mixed", batch=2, kv_heads=2, sequences="mixed")
COPIES = 3


def draw(case=CASE, seed=0):
    """Query, key and value."""
    arrays, _ = cases.make_inputs(case, seed)
    return tuple(jnp.asarray(arrays[name]) for name in ("query", "key", "value"))


def draw_copies():
    """Query, key and value with one more axis in front."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(draw(seed=seed) for seed in range(COPIES)))


def moba(implementation, case=CASE):
    return functools.partial(sparse_attn.moba_attention, **case.options, implementation=implementation)


def loss(attend):
    return lambda arrays: jnp.sin(attend(*arrays)).sum()


def assert_trees_close(actual, expected):
    jax.tree.map(lambda a, e: cases.assert_close(a, e, "float32"), actual, expected)


class VariantsTest(chex.TestCase):
    """Output and gradients with and without jit against the oracle."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_output_and_gradients(self):
        arrays, sequences = cases.make_inputs(MIXED)
        query, key, value, d_output = (jnp.asarray(array) for array in arrays.values())

        @self.variant
        def output_and_gradients(query, key, value, d_output, sequences):
            attend = functools.partial(moba("xla", MIXED), **sequences)
            output, pull_back = jax.vjp(attend, query, key, value)
            return output, pull_back(d_output)

        actual = output_and_gradients(query, key, value, d_output, sequences)
        query, key, value, d_output = arrays.values()
        expected = oracle.moba(query, key, value, d_output=d_output, **MIXED.options, **sequences)
        assert_trees_close(actual, expected)


@every_plain_backend
def test_vmap_over_one_more_axis_equals_a_loop(implementation):
    copies = draw_copies()
    attend = moba(implementation)
    together = jax.jit(jax.vmap(attend))(*copies)
    one_by_one = jax.jit(attend)
    for i in range(COPIES):
        cases.assert_close(together[i], one_by_one(*(array[i] for array in copies)), "float32")


@every_plain_backend
def test_vmap_over_heads_and_sequence_arguments_alone_equals_a_loop(implementation):
    query, key, value = draw()
    lengths = jnp.array([[24], [13], [0]], jnp.int32)

    @jax.jit
    def attend(query, length):
        return moba(implementation)(query, key, value, key_value_seq_lengths=length, query_seq_lengths=length)

    queries = jnp.stack([query, 2 * query, -query])
    together = jax.vmap(attend)(queries, lengths)
    for i in range(COPIES):
        cases.assert_close(together[i], attend(queries[i], lengths[i]), "float32")


@every_plain_backend
def test_gradients_and_vmap_commute(implementation):
    copies = draw_copies()
    gradient = jax.grad(loss(moba(implementation)))
    one_by_one = jax.jit(gradient)
    expected = [one_by_one(tuple(array[i] for array in copies)) for i in range(COPIES)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    vmap_of_grad = jax.jit(jax.vmap(gradient))(copies)
    grad_of_vmap = jax.jit(jax.grad(loss(jax.vmap(moba(implementation)))))(copies)
    assert_trees_close(vmap_of_grad, expected)
    assert_trees_close(grad_of_vmap, expected)


@every_plain_backend
def test_rematerialisation_changes_no_gradient(implementation):
    arrays, attend = draw(), moba(implementation)
    expected = jax.jit(jax.grad(loss(attend)))(arrays)
    assert_trees_close(jax.jit(jax.grad(loss(jax.checkpoint(attend))))(arrays), expected)


@every_plain_backend
def test_gradients_flow_through_a_scan_over_layers(implementation):
    case = dataclasses.replace(CASE, kv_heads=2)
    query, key, value = draw(case)
    weights = jnp.array([0.5, -1.0])
    exact = [np.asarray(array, np.float64) for array in (query, key, value)]
    hidden = exact[0] + 0.5 * oracle.moba(*exact, **case.options)  # what the second layer routes
    error = cases.TOLERANCE["float32"] * np.abs(hidden).max()
    assert oracle.route(hidden, exact[1], **case.options, input_error=error)[1].min() > 0, "draw other numbers"

    def layer(x, weight):
        return x + weight * moba(implementation, case)(x, key, value), None

    def scanned(weights):
        return jnp.sin(jax.lax.scan(layer, query, weights)[0]).sum()

    def unrolled(weights):
        return jnp.sin(layer(layer(query, weights[0])[0], weights[1])[0]).sum()

    assert_trees_close(jax.jit(jax.value_and_grad(scanned))(weights), jax.jit(jax.value_and_grad(unrolled))(weights))


@every_plain_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_16_bit_inputs_keep_their_dtype_under_jit_S8(dtype, implementation):
    arrays = tuple(array.astype(dtype) for array in draw())
    gradients = jax.eval_shape(jax.grad(loss(moba(implementation))), arrays)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(dtype)}


def test_new_contents_lengths_and_segments_do_not_compile_again():
    attend = moba("xla", MIXED)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def call(query, key, value, sequences):
        return attend(query, key, value, **sequences)

    outputs = []
    for seed in range(3):
        arrays, sequences = cases.make_inputs(MIXED, seed)
        outputs.append(call(arrays["query"], arrays["key"], arrays["value"], sequences))
    assert not np.array_equal(outputs[0], outputs[1])
    chex.clear_trace_counter()
