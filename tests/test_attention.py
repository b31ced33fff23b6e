"""Every public function against the NumPy oracle, for every implementation and every named shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from sparse_attn import BlockSelection
from tests import cases, oracle

pytestmark = pytest.mark.usefixtures("strict_ranks")

IMPLEMENTATIONS = ("reference", "xla", *(("pallas",) if jax.default_backend() == "gpu" else ()))


def select(case, indices):
    return BlockSelection(jnp.asarray(indices), block_size=case.block_size, num_blocks=case.num_blocks)


@functools.cache
def inputs(case):
    """Arrays, sequence arguments, and block ids that no router would give."""
    return *cases.make_inputs(case), cases.make_selection(case)


@functools.cache
def expected(case):
    """What the oracle routes, attends, and attends over the foreign ids."""
    arrays, sequences, foreign = inputs(case)
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    indices, gap = oracle.route(query, key, **case.options, **sequences)
    assert gap.min() > 0, "rounding may change a choice: take another seed"
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    masks = (oracle.attention_mask(ids, **reach, **sequences) for ids in (indices, foreign))
    return indices, *(oracle.attention(query, key, value, mask, scale=case.scale) for mask in masks)


@functools.cache
def actual(case, implementation):
    """The same three from the library, in one compiled call."""

    @jax.jit
    def call(query, key, value, foreign, sequences):
        options = {"is_causal": case.is_causal, "implementation": implementation, **sequences}
        sizes = {"block_size": case.block_size, "top_k": case.top_k}
        selection = sparse_attn.route_moba(query, key, **sizes, **options)
        output = sparse_attn.moba_attention(query, key, value, scale=case.scale, **sizes, **options)
        foreign = select(case, foreign)
        return (
            selection,
            output,
            sparse_attn.block_sparse_attention(query, key, value, foreign, scale=case.scale, **options),
        )

    arrays, sequences, foreign = inputs(case)
    return call(arrays["query"], arrays["key"], arrays["value"], foreign, sequences)


every_case = pytest.mark.parametrize("case", cases.CASES, ids=str)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
@every_case
def test_route_moba_chooses_exactly_the_oracle_s_blocks_in_its_order_S2_to_S7(case, implementation):
    selection, _, _ = actual(case, implementation)
    np.testing.assert_array_equal(selection.indices, expected(case)[0])
    assert selection.indices.dtype == jnp.int32
    assert (selection.block_size, selection.num_blocks) == (case.block_size, case.num_blocks)


@every_implementation
@every_case
def test_moba_attention_equals_the_oracle_S1_to_S9(case, implementation):
    _, output, _ = actual(case, implementation)
    assert output.dtype == cases.as_dtype(case.dtype)
    assert output.shape == (case.batch, case.queries, case.heads, case.head_dim)
    cases.assert_close(output, expected(case)[1], case.dtype)


@every_implementation
@every_case
def test_block_sparse_attention_takes_any_ids_and_ignores_what_may_not_be_seen(case, implementation):
    _, _, output = actual(case, implementation)
    cases.assert_close(output, expected(case)[2], case.dtype)


@every_implementation
def test_a_query_with_nothing_to_attend_to_gives_zeros_S9(implementation):
    for name in ("more_queries", "lengths", "mixed_segments"):
        case = next(case for case in cases.CASES if case.name == name)
        indices, *_ = expected(case)
        is_empty = (indices < 0).all(axis=-1).swapaxes(1, 2)  # [batch, queries, heads]
        assert is_empty.any()
        np.testing.assert_array_equal(np.asarray(actual(case, implementation)[1])[is_empty], 0)


@every_implementation
def test_the_log_sum_exp_merges_attention_over_parts_of_the_choice(implementation):
    case = next(case for case in cases.CASES if case.name == "mixed_segments")
    arrays, sequences, _ = inputs(case)
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    indices, output, _ = expected(case)

    @jax.jit
    def attend(indices):
        return sparse_attn.block_sparse_attention(
            query, key, value, select(case, indices), return_residual=True, implementation=implementation, **sequences
        )

    own, others = indices.copy(), indices.copy()
    own[..., 1:] = others[..., :1] = -1
    parts = [attend(part) for part in (own, others)]
    merged, log_sum_exp = sparse_attn.merge_partials(*(jnp.stack(part) for part in zip(*parts, strict=True)))
    cases.assert_close(merged, output, case.dtype)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), (indices < 0).all(axis=-1).swapaxes(1, 2))


def test_no_implementation_named_means_xla_on_a_cpu():
    case = cases.CASES[0]
    arrays, _, _ = inputs(case)
    output = jax.jit(functools.partial(sparse_attn.moba_attention, **case.options))(
        arrays["query"], arrays["key"], arrays["value"]
    )
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(output, actual(case, "xla")[1])
    else:
        cases.assert_close(output, expected(case)[1], case.dtype)


def test_float64_inputs_are_worked_through_in_float64_by_the_reference_S8():
    case = cases.CASES[0]
    with jax.enable_x64(True):
        arrays, _ = cases.make_inputs(case)
        query, key, value = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
        attend = functools.partial(sparse_attn.moba_attention, **case.options, implementation="reference")
        output = jax.jit(attend)(query, key, value)
        cases.assert_close(output, oracle.moba(query, key, value, **case.options), "float64")
