"""Merging of partial attention against attention over the union."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import merge_partials
from tests import cases

pytestmark = pytest.mark.usefixtures("strict_ranks")

PARTS, QUERIES, KEYS, HEAD_DIM = 3, 6, 12, 4


def attend(logits, value):
    """Softmax attention and its log-sum-exp in float64; an empty set gives zeros and -inf."""
    if logits.shape[1] == 0:
        return np.zeros((logits.shape[0], value.shape[1])), np.full(logits.shape[0], -np.inf)
    largest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ value / total, np.log(total[:, 0]) + largest[:, 0]


def partials(sizes, seed=0, shift=0.0):
    """Attention over consecutive parts of the keys, stacked, and over all of them."""
    random = np.random.default_rng(seed)
    logits, value = random.standard_normal((QUERIES, KEYS)) + shift, random.standard_normal((KEYS, HEAD_DIM))
    cuts = np.cumsum((0, *sizes))
    parts = [attend(logits[:, a:b], value[a:b]) for a, b in itertools.pairwise(cuts)]
    outputs, log_sum_exp = (np.stack(x).astype(np.float32) for x in zip(*parts, strict=True))
    return outputs, log_sum_exp, attend(logits[:, : cuts[-1]], value[: cuts[-1]])


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 10, 1), (0, 12, 0), (5, 0, 3)])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_merged_parts_equal_attention_over_the_union(sizes, shift):
    outputs, log_sum_exp, (output, total) = partials(sizes, shift=shift)
    merged, merged_log_sum_exp = merge_partials(*zip(outputs, log_sum_exp, strict=True))
    # The statistics are float32 numbers of the size of the shift, so that is what they are exact to.
    tolerance = cases.TOLERANCE["float32"] * max(1, abs(shift))
    np.testing.assert_allclose(merged, output, atol=tolerance)
    np.testing.assert_allclose(merged_log_sum_exp, total, atol=tolerance)


def test_nothing_to_merge_gives_zeros_and_minus_infinity_S9():
    merged, log_sum_exp = merge_partials(*[(jnp.zeros((QUERIES, HEAD_DIM)), jnp.full(QUERIES, -jnp.inf))] * PARTS)
    np.testing.assert_array_equal(merged, np.zeros((QUERIES, HEAD_DIM)))
    np.testing.assert_array_equal(log_sum_exp, np.full(QUERIES, -np.inf))


def test_merging_in_two_steps_equals_merging_at_once():
    outputs, log_sum_exp, _ = partials((4, 4, 4))
    parts = list(zip(outputs, log_sum_exp, strict=True))
    again = merge_partials(merge_partials(*parts[:2]), parts[2])
    chex.assert_trees_all_close(again, merge_partials(*parts), atol=cases.TOLERANCE["float32"])


def test_gradients_are_those_of_the_union_and_finite_beside_an_empty_part():
    outputs, log_sum_exp, (output, _) = partials((5, 0, 7))

    def loss(outputs, log_sum_exp):
        merged, total = merge_partials(*zip(outputs, log_sum_exp, strict=True))
        return merged.sum() + total.sum()

    d_outputs, d_log_sum_exp = jax.grad(loss, argnums=(0, 1))(outputs, log_sum_exp)
    weight = np.exp(log_sum_exp - np.logaddexp.reduce(log_sum_exp))  # [parts, queries]
    expected = weight * (1 + (outputs - output).sum(axis=-1))
    np.testing.assert_allclose(d_outputs, np.broadcast_to(weight[..., None], outputs.shape), atol=1e-5)
    np.testing.assert_allclose(d_log_sum_exp, expected, atol=1e-5)


def test_the_dtype_of_the_outputs_is_kept():
    outputs, log_sum_exp, _ = partials((4, 4, 4))
    merged, total = merge_partials(*zip(outputs.astype(jnp.bfloat16), log_sum_exp, strict=True))
    assert merged.dtype == jnp.bfloat16
    assert total.dtype == jnp.float32
