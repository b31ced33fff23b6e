"""Every public function, values and gradients, against the NumPy oracle: every backend, every named shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from sparse_attn import BlockSelection
from tests import cases, oracle
from tests.backends import BACKENDS, every_backend, every_plain_backend

pytestmark = [pytest.mark.usefixtures("strict_ranks"), pytest.mark.timeout(120)]

# Interpreters are slow: a case takes some five seconds on Triton, minutes with many blocks, and up to sixty on the TPU
# kernels, which take blocks and heads of a size of their own. Those named here run; `tests/tpu` and `tests/gpu` have
# what is peculiar to the kernels.
INTERPRETED = {
    "triton": (
        *("ragged_tail", "grouped_heads", "more_queries", "lengths", "mixed_segments", "bidirectional_mixed"),
        "bfloat16",
    ),
    "tpu": ("lengths",),
}


def select(case, indices):
    return BlockSelection(jnp.asarray(indices), block_size=case.block_size, num_blocks=case.num_blocks)


@functools.cache
def inputs(case):
    """Arrays, sequence arguments, and block ids that no router would give."""
    return *cases.make_inputs(case), cases.make_selection(case)


@functools.cache
def expected(case):
    """What the oracle routes; output and gradients of that choice, and of the foreign ids."""
    arrays, sequences, foreign = inputs(case)
    query, key, value, d_output = arrays.values()
    indices, gap = oracle.route(query, key, **case.options, **sequences)
    assert gap.min() > 0, "rounding may change a choice: take another seed"
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    masks = (oracle.attention_mask(ids, **reach, **sequences) for ids in (indices, foreign))
    options = {"scale": case.scale, "d_output": d_output}
    return indices, *(oracle.attention(query, key, value, mask, **options) for mask in masks)


@functools.cache
def compiled(case, implementation):
    """A function of arrays, foreign ids and sequence arguments: the three of `expected` from the library."""

    @jax.jit
    def call(query, key, value, d_output, foreign, sequences):
        options = {"is_causal": case.is_causal, "implementation": implementation, **sequences}
        sizes = {"block_size": case.block_size, "top_k": case.top_k}

        def attend(query, key, value):
            selection = sparse_attn.route_moba(query, key, **sizes, **options)
            both = {"scale": case.scale, **options}
            outputs = (
                sparse_attn.moba_attention(query, key, value, **sizes, **both),
                sparse_attn.block_sparse_attention(query, key, value, select(case, foreign), **both),
            )
            return outputs, selection

        outputs, pull_back, selection = jax.vjp(attend, query, key, value, has_aux=True)
        zeros = jnp.zeros_like(d_output)
        gradients = pull_back((d_output, zeros)), pull_back((zeros, d_output))
        return selection, *zip(outputs, gradients, strict=True)

    return call


@functools.cache
def actual(case, backend):
    arrays, sequences, foreign = inputs(case)
    return jax.block_until_ready(compiled(case, BACKENDS[backend]())(*arrays.values(), foreign, sequences))


def case_for(backend, name):
    """The case of that name, at the size that the backend's kernels take."""
    case = next(case for case in cases.CASES if case.name == name)
    if name not in INTERPRETED.get(backend, (name,)):
        pytest.skip(f"{name} is too slow to interpret with the others, see INTERPRETED")
    return cases.at_kernel_size(case) if backend == "tpu" else case


every_case = pytest.mark.parametrize("name", [case.name for case in cases.CASES])


@every_backend
@every_case
def test_route_moba_chooses_exactly_the_oracle_s_blocks_in_its_order_S2_to_S7(name, backend, capfd):
    case = case_for(backend, name)
    selection, *_ = actual(case, backend)
    assert "RACE DETECTED" not in capfd.readouterr().out
    np.testing.assert_array_equal(selection.indices, expected(case)[0])
    assert selection.indices.dtype == jnp.int32
    assert (selection.block_size, selection.num_blocks) == (case.block_size, case.num_blocks)


@every_backend
@every_case
def test_moba_attention_equals_the_oracle_S1_to_S9(name, backend):
    case = case_for(backend, name)
    _, (output, gradients), _ = actual(case, backend)
    indices, (expected_output, expected_gradients), _ = expected(case)
    assert output.dtype == cases.as_dtype(case.dtype)
    assert output.shape == (case.batch, case.queries, case.heads, case.head_dim)
    cases.assert_close(output, expected_output, case.dtype)
    assert_gradients_close(case, gradients, expected_gradients)
    is_empty = (indices < 0).all(axis=-1).swapaxes(1, 2)  # [batch, queries, heads]
    assert is_empty.any() or name not in ("more_queries", "lengths", "mixed_segments")
    for array in (output, gradients[0]):
        np.testing.assert_array_equal(np.asarray(array, np.float32)[is_empty], 0)


@every_backend
@every_case
def test_block_sparse_attention_takes_any_ids_and_ignores_what_may_not_be_seen(name, backend):
    case = case_for(backend, name)
    *_, (output, gradients) = actual(case, backend)
    *_, (expected_output, expected_gradients) = expected(case)
    cases.assert_close(output, expected_output, case.dtype)
    assert_gradients_close(case, gradients, expected_gradients)


def assert_gradients_close(case, gradients, expected):
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        cases.assert_close(gradient, expected_gradient, case.dtype)


@every_plain_backend
def test_the_log_sum_exp_merges_attention_over_parts_of_the_choice(implementation):
    case = next(case for case in cases.CASES if case.name == "mixed_segments")
    arrays, sequences, _ = inputs(case)
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    indices, (output, _), _ = expected(case)

    @jax.jit
    def attend(indices):
        options = {"is_causal": True, "return_residual": True, "implementation": implementation}
        return sparse_attn.block_sparse_attention(query, key, value, select(case, indices), **options, **sequences)

    own, others = indices.copy(), indices.copy()
    own[..., 1:] = others[..., :1] = -1
    merged, log_sum_exp = sparse_attn.merge_partials(*(attend(part) for part in (own, others)))
    cases.assert_close(merged, output, case.dtype)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), (indices < 0).all(axis=-1).swapaxes(1, 2))


def test_no_implementation_named_means_xla_on_a_cpu():
    case = cases.CASES[0]
    arrays, _, _ = inputs(case)
    output = jax.jit(functools.partial(sparse_attn.moba_attention, **case.options))(
        arrays["query"], arrays["key"], arrays["value"]
    )
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(output, actual(case, "xla")[1][0])
    else:
        cases.assert_close(output, expected(case)[1][0], case.dtype)


def test_values_may_have_a_head_dim_of_their_own():
    random = np.random.default_rng(0)
    query, key, value, d_output = (
        random.standard_normal((2, 19, heads, size)).astype(np.float32)
        for heads, size in ((4, 6), (2, 6), (2, 3), (4, 3))
    )
    sizes = {"block_size": 4, "top_k": 2, "is_causal": True}
    want, gradients = oracle.moba(query, key, value, d_output=d_output, **sizes)
    for implementation in ("reference", "xla"):
        attend = functools.partial(sparse_attn.moba_attention, **sizes, implementation=implementation)
        output, pull_back = jax.vjp(jax.jit(attend), query, key, value)
        cases.assert_close(output, want, "float32")
        for actual_gradient, gradient in zip(pull_back(d_output), gradients, strict=True):
            cases.assert_close(actual_gradient, gradient, "float32")


def test_arrays_without_a_batch_axis_give_what_a_batch_of_one_gives():
    case = cases.Case("one", batch=1, queries=19, keys=19, heads=2, kv_heads=1, block_size=4)
    arrays, _ = cases.make_inputs(case)
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    ids, options = np.arange(19) // 7, case.options
    batched = sparse_attn.moba_attention(query, key, value, segment_ids=ids[None], seq_lengths=[17], **options)
    single = sparse_attn.moba_attention(query[0], key[0], value[0], segment_ids=ids, seq_lengths=17, **options)
    np.testing.assert_array_equal(single, batched[0])
    lists = (array[0].tolist() for array in (query, key, value))
    single = sparse_attn.moba_attention(*lists, segment_ids=ids.tolist(), seq_lengths=17, **options)
    np.testing.assert_array_equal(single, batched[0])
    selection = sparse_attn.route_moba(query[0], key[0], **options)
    chosen = sparse_attn.route_moba(query, key, **options)
    np.testing.assert_array_equal(selection.indices, chosen.indices[0])
    output, log_sum_exp = sparse_attn.block_sparse_attention(
        query[0], key[0], value[0], selection, is_causal=True, return_residual=True
    )
    assert (output.shape, log_sum_exp.shape) == ((19, 2, 8), (19, 2))
    cases.assert_close(
        output, sparse_attn.block_sparse_attention(query, key, value, chosen, is_causal=True)[0], "float32"
    )
    window = functools.partial(sparse_attn.sliding_window_attention, window_size=3)
    np.testing.assert_array_equal(window(query[0], key[0], value[0]), window(query, key, value)[0])


def test_float64_inputs_are_worked_through_in_float64_by_the_reference_S8():
    case = cases.CASES[0]
    with jax.enable_x64(True):
        arrays, _ = cases.make_inputs(case)
        query, key, value = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
        attend = functools.partial(sparse_attn.moba_attention, **case.options, implementation="reference")
        output = jax.jit(attend)(query, key, value)
        cases.assert_close(output, oracle.moba(query, key, value, **case.options), "float64")
