"""SALE against loops in float64: integers, relative scores, forced tiles, calibration, output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.sale import SALE, quantise
from tests import near_ties, oracle
from tests.cases import assert_close

TOKENS, BQ, BK, WINDOW = 64, 12, 5, 17  # a power of two, so that means are exact; blocks of both kinds end short
SYSTEM = SALE(query_block_size=BQ, key_block_size=BK, local_window=WINDOW, dense_length=32, scale=0.4)
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))


def draw(dtype=np.float32, seed=0):
    """Multiples of 1/8, so that rounding to integers meets no rounding of ours; two query heads to a key head."""
    random = np.random.default_rng(seed)
    query = near_ties.eighths(random.standard_normal((2, TOKENS, 4, 8)))
    key = near_ties.eighths(random.standard_normal((2, TOKENS, 2, 8)) + random.standard_normal((1, 1, 2, 8)))
    return query.astype(dtype), key.astype(dtype), random.standard_normal(key.shape).astype(dtype)


def to_integers(array):
    """Integers and steps of tokens [tokens, d], by the definition."""
    largest = np.abs(array).max(-1, keepdims=True)
    return np.rint(7 * array / largest).astype(int), largest / 7


def choose(query, key, threshold, scale):
    """bool [batch, heads, queries, keys], tile by tile, and [batch, heads, queries], where no rounding changes it.

    The threshold is one number a head.
    """
    mask, decided = np.zeros((2, 4, TOKENS, TOKENS), bool), np.ones((2, 4, TOKENS), bool)
    for b, h in np.ndindex(2, 4):
        q, k = query[b, :, h].astype(np.float64), key[b, :, h // 2].astype(np.float64)
        smooth = k - k.mean(0)
        (n_t, step_t), (n_s, step_s) = to_integers(q - q.mean(0)), to_integers(smooth)
        quantised, of_mean = step_t * step_s.T * (n_t @ n_s.T), smooth @ q.mean(0)
        estimate = scale * (quantised + of_mean)  # [queries, keys]
        # Rounded are both steps, their products, the product with the mean query, the sum, and what the scale does.
        error = scale * (7 * np.abs(quantised) + 11 * np.abs(smooth) @ np.abs(q.mean(0)))
        of_logits = 10 * scale * np.abs(q) @ np.abs(smooth).T
        weight = np.exp(scale * q @ smooth.T) * CAUSAL
        for start in range(0, TOKENS, BQ):
            rows, window = slice(start, start + BQ), (start + BQ - WINDOW) // BK  # first block of the window
            forced = {0, *range(max(window, 0), -(-TOKENS // BK))}
            mass = weight[rows, np.isin(np.arange(TOKENS) // BK, list(forced))].sum(-1, keepdims=True)
            with np.errstate(divide="ignore"):
                line = np.log(mass) + np.log(threshold[h], dtype=np.float64)  # of the logarithms that the library takes
            of_mass = of_logits[rows].max(-1, keepdims=True) + TOKENS + 2 * near_ties.EXP + 3 * np.abs(np.log(mass))
            slack = near_ties.UNIT * (error[rows] + of_mass + np.abs(estimate[rows]))
            for j in range(-(-TOKENS // BK)):
                columns = slice(BK * j, BK * j + BK)
                above, around = estimate[rows, columns] - line, slack[:, columns]
                mask[b, h, rows, columns] = j in forced or (above > 0).any()
                decided[b, h, rows] &= j in forced or (above > around).any() or (above < -around).all()
    return mask & CAUSAL, near_ties.most(decided)


def tokens_of(levels):
    """The keys of the chosen tiles that a query may see."""
    return np.asarray(levels.to_mask()).repeat(BQ, 2).repeat(BK, 3)[:, :, :TOKENS, :TOKENS] & CAUSAL


attend = jax.jit(SYSTEM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_equals_a_dense_softmax_over_the_choice_of_loops(dtype, strict_ranks):
    query, key, value = draw(jnp.dtype(dtype))
    threshold = np.array([0.5, 0.2, 3.0, 1e-9], np.float32)
    mask, decided = choose(query, key, threshold, 0.4)
    shares = mask.mean((0, 2, 3)) / CAUSAL.mean()
    assert shares[2] < shares[0] < shares[1] < shares[3] == 1
    output = attend(query, key, value, threshold)
    assert output.dtype == dtype
    rows = decided.swapaxes(1, 2)
    assert_close(output, oracle.attention(query, key, value, mask, scale=0.4), dtype, rows)
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value, threshold)[1], output[1])


def test_choice_equals_loops_and_no_threshold_is_dense_and_the_highest_leaves_the_forced_tiles(strict_ranks):
    query, key, _ = draw()
    threshold = np.array([0.5, 0.2, 0.0, np.inf], np.float32)
    chosen = tokens_of(jax.jit(SYSTEM.select)(query, key, threshold))
    expected, decided = choose(query, key, threshold, 0.4)
    np.testing.assert_array_equal(chosen[decided], expected[decided])
    np.testing.assert_array_equal(chosen[:, 2], [CAUSAL, CAUSAL])
    block, first = np.arange(TOKENS) // BK, (np.arange(TOKENS) // BQ + 1) * BQ - WINDOW  # first key of the window
    forced = CAUSAL & ((block == 0) | (block >= first[:, None] // BK))
    np.testing.assert_array_equal(chosen[:, 3], [forced, forced])


def test_short_prompts_are_dense():
    query, key, _ = draw()
    for dense_length in (TOKENS, TOKENS - 1):
        system = dataclasses.replace(SYSTEM, dense_length=dense_length, threshold=np.inf)
        chosen = tokens_of(jax.jit(system.select)(query, key))
        assert (chosen == CAUSAL).all() == (dense_length == TOKENS)


def test_integers_reach_seven_and_a_token_of_zeros_stays_zero():
    array = np.array([[0.5, -1.0, 0.25], [0, 0, 0], [1e-30, 0, -1e-30], [2, -2, 3]], np.float32)
    numbers, step = jax.jit(quantise)(array)
    np.testing.assert_array_equal(numbers, [[4, -7, 2], [0, 0, 0], [7, 0, -7], [5, -5, 7]])
    assert numbers.dtype == jnp.int8
    assert_close(step, [1 / 7, 0, 1e-30 / 7, 3 / 7], "float32")


def test_calibration_equals_halving_by_loops():
    error = 2.2e-5  # with peaked logits nearly all tiles stay, and errors are small
    query, key, value = draw(seed=1)
    everything = np.broadcast_to(CAUSAL, (2, 4, TOKENS, TOKENS))
    exact, expected = oracle.attention(query, key, value, everything, scale=8.0), np.full(4, 0.008)
    # Logits are exact. Two outputs err by the roundings of exp and of sums, above and below, of the weights that count.
    logits = np.einsum("bthd,bshd->bhts", 8.0 * query.astype(np.float64), key.repeat(2, 2))
    weight, _ = near_ties.softmax(np.where(CAUSAL, logits, -np.inf), 0)
    roundings = 2 * near_ties.EXP + 2 * (weight > near_ties.UNIT).sum(-1) + 2
    size = np.einsum("bhts,bshd->bht", weight, np.abs(value.repeat(2, 2)))
    slack = 2 * near_ties.UNIT * (roundings * size).mean(-1)
    for _ in range(8):
        mask, decided = choose(query, key, expected, 8.0)
        assert decided.all()
        output = oracle.attention(query, key, value, mask, scale=8.0)
        distance = np.abs(output - exact).sum((1, 3)) / TOKENS
        assert (np.abs(distance - error) > slack).all()
        is_bad = (distance >= error).any(0)
        expected = np.where(is_bad, expected / 2, expected)
        expected = np.where(expected <= 1e-4, 0, expected)
    assert len(set(expected)) == 3
    calibrate = dataclasses.replace(SYSTEM, scale=8.0).calibrate
    actual = jax.jit(functools.partial(calibrate, error=error))(query, key, value)
    assert_close(actual, expected, "float32")


def test_a_padded_row_is_a_sequence_of_its_own(strict_ranks):
    arrays = *draw(), np.array([0.5, 0.2, 3.0, 1e-9], np.float32)
    output = jax.jit(functools.partial(SYSTEM, seq_lengths=np.array([0, TOKENS])))(*arrays)
    assert_close(output[1], attend(*arrays)[1], "float32")
    np.testing.assert_array_equal(output[0], 0)


def test_bad_arguments_are_named():
    query, key, value = draw()
    for options, name in (
        ({"threshold": -0.1}, "threshold must be"),
        ({"local_window": 11}, "local_window must"),
        ({"dense_length": -1}, "dense_length"),
        ({"query_block_size": 0}, "query_block_size"),
        ({"key_block_size": 0}, "key_block_size"),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(SYSTEM, **options)
    with pytest.raises(ValueError, match="thresholds must be"):
        SYSTEM(query, key, value, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="as many tokens"):
        SYSTEM(query[:, 1:], key, value)
