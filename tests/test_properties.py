"""Laws that hold for any contents, lengths, segments and seeds.

A few shapes are compiled once each; hypothesis varies everything else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparse_attn
from tests import cases, near_ties, oracle

pytestmark = pytest.mark.usefixtures("strict_ranks")

SHAPES = (
    cases.Case("causal", batch=2, queries=28, keys=28, heads=4, kv_heads=2, block_size=4, top_k=3, sequences="mixed"),
    cases.Case("cross", batch=2, queries=17, keys=30, kv_heads=1, block_size=5, is_causal=False, sequences="mixed"),
    cases.Case("half", batch=1, queries=40, keys=40, kv_heads=1, dtype="bfloat16", sequences="mixed", exact=True),
)
CAUSAL = SHAPES[0]
PLAIN = cases.Case("plain", batch=2, queries=40, keys=40, heads=2, kv_heads=1, block_size=4, top_k=3)
SEEDS = st.integers(0, 2**32 - 1)


@functools.cache
def compiled(case, implementation="xla"):
    """A function: query, key, value, d_output, sequence arguments -> output, gradients, block ids."""

    @jax.jit
    def call(query, key, value, d_output, sequences):
        options = {**case.options, "implementation": implementation, **sequences}
        output, pull_back = jax.vjp(functools.partial(sparse_attn.moba_attention, **options), query, key, value)
        return output, pull_back(d_output), sparse_attn.route_moba(query, key, **options).indices

    return call


def call(case, arrays, sequences=None, implementation="xla"):
    result = compiled(case, implementation)(*arrays.values(), sequences or {})
    return jax.tree.map(np.asarray, result)


@st.composite
def sequence_arguments(draw, case):
    """Lengths from nothing to everything, and few or many segment ids in any order."""
    random = np.random.default_rng(draw(SEEDS))
    low, num_ids = draw(st.integers(-3, 3)), draw(st.sampled_from([1, 2, 3, 12]))
    arguments = {}
    for side, num_tokens in (("query", case.queries), ("key_value", case.keys)):
        lengths = draw(st.lists(st.integers(0, num_tokens), min_size=case.batch, max_size=case.batch))
        arguments[f"{side}_seq_lengths"] = np.array(lengths, np.int32)
        ids = random.integers(low, low + num_ids, (case.batch, num_tokens))
        is_sorted = draw(st.booleans())
        arguments[f"{side}_segment_ids"] = (np.sort(ids) if is_sorted else ids).astype(np.int32)
    return arguments


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@given(data=st.data(), seed=SEEDS)
def test_any_sequences_give_the_oracle_s_choice_outputs_and_gradients(case, implementation, data, seed):
    arrays, _ = cases.make_inputs(case, seed)
    sequences = data.draw(sequence_arguments(case))
    query, key, value, d_output = arrays.values()
    indices, gap = oracle.route(query, key, **case.options, **sequences)
    is_clear = near_ties.most(gap > 0)  # [batch, heads, queries]
    d_output = np.where(is_clear.swapaxes(1, 2)[..., None], d_output, 0).astype(d_output.dtype)
    arrays["d_output"] = d_output
    expected, expected_gradients = oracle.moba(query, key, value, d_output=d_output, **case.options, **sequences)
    output, gradients, chosen = call(case, arrays, sequences, implementation)
    np.testing.assert_array_equal(chosen[is_clear], indices[is_clear])
    cases.assert_close(output, expected, case.dtype, rows=is_clear.swapaxes(1, 2))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, case.dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(seed=SEEDS, now=st.integers(0, PLAIN.queries - 1))
def test_changing_the_future_changes_nothing_before_to_the_bit(implementation, seed, now):
    arrays, _ = cases.make_inputs(PLAIN, seed)
    others, _ = cases.make_inputs(PLAIN, seed + 1)
    is_future = (np.arange(PLAIN.queries) > now)[:, None, None]
    changed = {name: np.where(is_future, others[name], arrays[name]) for name in arrays}
    output, _, indices = call(PLAIN, arrays, implementation=implementation)
    output_changed, _, indices_changed = call(PLAIN, changed, implementation=implementation)
    np.testing.assert_array_equal(indices[:, :, : now + 1], indices_changed[:, :, : now + 1])
    np.testing.assert_array_equal(output[:, : now + 1], output_changed[:, : now + 1])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(data=st.data(), seed=SEEDS)
def test_a_batch_row_does_not_depend_on_the_others_to_the_bit_S7(implementation, data, seed):
    arrays, _ = cases.make_inputs(CAUSAL, seed)
    others, _ = cases.make_inputs(CAUSAL, seed + 1)
    sequences, other_sequences = (data.draw(sequence_arguments(CAUSAL)) for _ in range(2))

    def first_of(row, rest):
        return {name: np.concatenate([row[name][:1], rest[name][1:]]) for name in row}

    output, gradients, indices = call(CAUSAL, arrays, sequences, implementation)
    mixed = call(CAUSAL, first_of(arrays, others), first_of(sequences, other_sequences), implementation)
    for here, there in zip((output, *gradients, indices), (mixed[0], *mixed[1], mixed[2]), strict=True):
        np.testing.assert_array_equal(here[0], there[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(data=st.data(), seed=SEEDS)
def test_the_same_call_gives_the_same_bits_twice(implementation, data, seed):
    arrays, _ = cases.make_inputs(CAUSAL, seed)
    sequences = data.draw(sequence_arguments(CAUSAL))
    first, second = (call(CAUSAL, arrays, sequences, implementation) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def order_within_segments(ids, random):
    """A random order of the tokens that keeps every segment's own order."""
    shuffled = random.permutation(ids)
    order = np.empty(ids.size, np.int64)
    for segment in np.unique(ids):
        order[shuffled == segment] = np.flatnonzero(ids == segment)
    return order


@given(data=st.data(), seed=SEEDS)
def test_names_and_places_of_segments_do_not_matter_S7(data, seed):
    arrays, _ = cases.make_inputs(CAUSAL, seed)
    sequences = data.draw(sequence_arguments(CAUSAL))
    for side, num_tokens in (("query", CAUSAL.queries), ("key_value", CAUSAL.keys)):
        sequences[f"{side}_seq_lengths"] = np.full(CAUSAL.batch, num_tokens, np.int32)
    _, gap = oracle.route(arrays["query"], arrays["key"], **CAUSAL.options, **sequences)
    output, _, _ = call(CAUSAL, arrays, sequences)

    random = np.random.default_rng(seed)
    names = random.permutation(np.arange(-100, 100))  # any ids, in any order
    moved, orders = {"d_output": arrays["d_output"]}, {}
    moved_sequences = dict(sequences)
    for side, members in (("query", ("query",)), ("key_value", ("key", "value"))):
        ids = sequences[f"{side}_segment_ids"]
        order = orders[side] = np.stack([order_within_segments(row, random) for row in ids])
        moved_sequences[f"{side}_segment_ids"] = names[np.take_along_axis(ids, order, 1) + 100].astype(np.int32)
        for name in members:
            moved[name] = np.take_along_axis(arrays[name], order[:, :, None, None], 1)
    moved = {name: moved[name] for name in arrays}
    output_moved, _, _ = call(CAUSAL, moved, moved_sequences)
    expected = np.take_along_axis(output, orders["query"][:, :, None, None], 1)
    is_clear = np.take_along_axis(near_ties.most(gap > 0).swapaxes(1, 2), orders["query"][:, :, None], 1)
    cases.assert_close(output_moved, expected, CAUSAL.dtype, rows=is_clear)


@given(seed=SEEDS, length=st.integers(1, CAUSAL.keys))
def test_a_packed_sequence_equals_the_sequence_alone_S7(seed, length):
    arrays, _ = cases.make_inputs(CAUSAL, seed)
    ids = np.broadcast_to(np.arange(CAUSAL.keys) >= length, (CAUSAL.batch, CAUSAL.keys)).astype(np.int32)
    lengths = np.full(CAUSAL.batch, CAUSAL.keys, np.int32)
    sequences = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    packed, _, _ = call(CAUSAL, arrays, sequences | {"query_segment_ids": ids, "key_value_segment_ids": ids})
    ids = np.zeros_like(ids)
    sequences = {name: np.full_like(lengths, length) for name in sequences}
    alone, _, _ = call(CAUSAL, arrays, sequences | {"query_segment_ids": ids, "key_value_segment_ids": ids})
    np.testing.assert_array_equal(packed[:, :length], alone[:, :length])
    assert jnp.isfinite(packed).all()
