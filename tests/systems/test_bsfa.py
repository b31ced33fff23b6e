"""BSFA against loops over tiles in float64: thresholds, choice, output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.bsfa import BSFA
from tests import near_ties, oracle
from tests.cases import assert_close

SYSTEM = BSFA(query_block_size=8, key_block_size=4, scale=0.5)
TOKENS = 37
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))


def draw(dtype=np.float32, seed=0):
    """Three rows, two key/value heads of two query heads each; blocks end short; logits are exact."""
    random = np.random.default_rng(seed)
    query = near_ties.eighths(random.standard_normal((3, TOKENS, 4, 4))).astype(dtype)
    return query, *near_ties.eighths(random.standard_normal((2, 3, TOKENS, 2, 4))).astype(dtype)


def draw_thresholds():
    """Of a head and a query block; the fifth block has the last's. Some logits are just as high."""
    return near_ties.eighths(np.random.default_rng(1).uniform(0.25, 1.75, (4, 4))).astype(np.float32)


def maxima(query, key, b, h, i, scale):
    """Block of keys -> largest logit, for the tiles wholly before query block i."""
    q, k = query[b, 8 * i : 8 * i + 8, h].astype(np.float64), key[b, :, h // 2].astype(np.float64)
    return {j: scale * (q @ k[4 * j : 4 * j + 4].T).max() for j in range(2 * i)}


def choose(query, key, thresholds, scale):
    """bool [batch, heads, tokens, tokens] by loops."""
    mask = np.zeros((query.shape[0], 4, TOKENS, TOKENS), bool)
    for b, h, i in np.ndindex(query.shape[0], 4, 5):
        kept = [j for j, m in maxima(query, key, b, h, i, scale).items() if m >= thresholds[h, min(i, 3)]]
        for t in range(8 * i, min(8 * i + 8, TOKENS)):
            for s in range(t + 1):
                mask[b, h, t, s] = s // 4 in kept or s // 8 == i
    return mask


@pytest.mark.parametrize(("aggregation", "top_k"), [("mean", 3), ("median", 1), ("mean", 20)])
def test_thresholds_equal_loops(aggregation, top_k, strict_ranks):
    query, key, _ = draw()
    if aggregation == "median":
        query, key = abs(query), -abs(key)  # all maxima below 0
    calibrate = functools.partial(SYSTEM.calibrate, top_k=top_k, aggregation=aggregation)
    expected = np.full((4, 5), -np.inf)
    for h, i in np.ndindex(4, 5):
        if 2 * i > top_k:
            ranked = np.array([sorted(maxima(query, key, b, h, i, 0.5).values()) for b in range(3)])[:, ::-1]
            midpoint = (ranked[:, top_k - 1] + ranked[:, top_k]) / 2
            expected[h, i] = midpoint.mean() if aggregation == "mean" else np.median(midpoint)
    thresholds = np.asarray(jax.jit(calibrate)(query, key))
    np.testing.assert_array_equal(np.isneginf(thresholds), np.isneginf(expected))
    assert_close(np.nan_to_num(thresholds, neginf=0), np.nan_to_num(expected, neginf=0), "float32")


attend = jax.jit(SYSTEM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_equals_a_dense_softmax_over_the_choice_of_loops(dtype, strict_ranks):
    query, key, value = draw(jnp.dtype(dtype))
    thresholds = draw_thresholds()
    mask = choose(query, key, thresholds, 0.5)
    assert 0.2 < mask.mean() / CAUSAL.mean() < 0.9
    output = attend(query, key, value, thresholds)
    assert output.dtype == dtype
    assert_close(output, oracle.attention(query, key, value, mask, scale=0.5), dtype)
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value, thresholds)[1:], output[1:])


def test_choice_equals_loops_and_no_threshold_is_dense_and_the_highest_keeps_the_diagonal(strict_ranks):
    query, key, _ = draw()
    thresholds = draw_thresholds()
    thresholds[2:] = [[-np.inf] * 4, [np.inf] * 4]
    levels = jax.jit(SYSTEM.select)(query, key, thresholds)
    chosen = np.asarray(levels.to_mask()).repeat(8, 2).repeat(4, 3)[:, :, :TOKENS, :TOKENS] & CAUSAL
    np.testing.assert_array_equal(chosen, choose(query, key, thresholds, 0.5))
    block = np.arange(TOKENS) // 8
    np.testing.assert_array_equal(chosen[0, 2:], [CAUSAL, CAUSAL & (block[:, None] == block)])


def test_a_padded_row_is_a_sequence_of_its_own(strict_ranks):
    arrays = *draw(), draw_thresholds()
    output = jax.jit(functools.partial(SYSTEM, seq_lengths=np.array([TOKENS, 0, 0])))(*arrays)
    assert_close(output[0], attend(*arrays)[0], "float32")
    np.testing.assert_array_equal(output[1:], 0)


def test_bad_arguments_are_named():
    query, key, value = draw()
    table = np.zeros((4, 5), np.float32)
    for arguments, name in (
        ({"thresholds": table[:2]}, "thresholds must be"),
        ({"thresholds": table[:, :0]}, "thresholds must be"),
        ({"thresholds": table[0]}, "thresholds must be"),
        ({"key": key[:, 1:], "value": value[:, 1:]}, "as many tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            SYSTEM(**{"query": query, "key": key, "value": value, "thresholds": table, **arguments})
    for name in ("query_block_size", "key_block_size"):
        with pytest.raises(ValueError, match=name):
            BSFA(**{name: 0})
    for options, name in (({"top_k": 0}, "top_k"), ({"aggregation": "max"}, "aggregation must be")):
        with pytest.raises(ValueError, match=name):
            SYSTEM.calibrate(query, key, **options)
