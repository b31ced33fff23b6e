"""Rectified SpaAttn against loops in float64: pooled attention, choice, compensation, text, short last blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar import order
from sparse_attn.systems.rectified import RectifiedSpaAttn
from tests import near_ties, oracle
from tests.cases import assert_close
from tests.systems.check_rectified import Published

GRID, VIDEO = (3, 5, 4), 60  # eight blocks of 8 tokens, the last of 4
FORCED = order.neighbouring_blocks(GRID, order.space_filling_curve(GRID), 8) & (np.arange(8) % 3 == 0)
OPTIONS = {"block_size": 8, "threshold": 0.4, "top_k": 2}


def draw(text=13, dtype=np.float32, seed=0):
    """Blocks of the video have a common part, so that some gain from pooling; products of means are exact."""
    random = np.random.default_rng(seed)
    query, key, value = random.standard_normal((3, 2, VIDEO + text, 4, 8))
    for array in (query, key):
        centre = 1.5 * random.standard_normal((2, 12, 4, 8))
        shared = centre * random.uniform(0, 1, (2, 12, 1, 1))
        array += shared[:, np.arange(VIDEO + text) // 8]
    return tuple(near_ties.eighths(x).astype(dtype) for x in (query, key[:, :, :2], value[:, :, :2]))


def expect(query, key, value, text, forced=None, scale=8**-0.5):
    """Levels of the video and output of all tokens, by definition; and where no rounding changes them.

    The last for blocks, bool [batch, heads, blocks], and for queries, bool [batch, tokens, heads].
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    num_video = tokens - text
    blocks = [slice(start, min(start + 8, num_video)) for start in range(0, num_video, 8)]
    levels = np.zeros((batch, heads, len(blocks), len(blocks)), int)
    mask = np.ones((batch, heads, tokens, tokens), bool)
    decided = np.zeros(levels.shape[:3], bool)
    factor, compensation = np.ones((batch, tokens, heads, 1)), np.zeros(query.shape)
    for b, h, i in np.ndindex(batch, heads, len(blocks)):
        q, k, v = query[b, blocks[i], h], key[b, :, h // 2], value[b, :, h // 2]
        mean, spread = q.mean(0), np.abs(q - q.mean(0)).mean(0)
        logits, gains = [], []
        for block in blocks:
            key_mean = k[block].mean(0)
            key_spread = np.abs(k[block] - key_mean).mean(0)
            logits.append(scale * mean @ key_mean + np.log(len(k[block])))
            gains.append(abs(mean @ key_mean) > abs(spread @ key_mean) + abs(mean @ key_spread))
        logits = np.array([*logits, *(scale * k[num_video:] @ mean)])
        # Rounded are the scale, its product, the log of the length, up to log 8, and the sum.
        share, error = near_ties.softmax(logits, 3 * near_ties.UNIT * (np.abs(logits) + np.log(8)))
        share, error = (np.append(x[: len(blocks)], x[len(blocks) :].sum()) for x in (share, error))
        error[-1] += text * near_ties.UNIT * share[-1]
        ranking = np.argsort(-share, kind="stable")
        enough = next(n for n in range(1, len(share) + 1) if share[ranking[:n]].sum() >= 0.4)
        count, place = max(2, enough), np.arange(len(share))
        decided[b, h, i] = near_ties.is_decided(share, error, np.isin(place, ranking[:2]))
        decided[b, h, i] &= near_ties.is_prefix_decided(share, error, np.isin(place, ranking[:enough]), 0.4)
        for j in range(len(blocks)):
            is_kept = j in ranking[:count] or (forced is not None and forced[i, j])
            levels[b, h, i, j] = 1 if is_kept else 2 * gains[j]
            mask[b, h, blocks[i], blocks[j]] = is_kept
            if levels[b, h, i, j] == 2:
                factor[b, blocks[i], h] -= share[j]
                compensation[b, blocks[i], h] += share[j] * v[blocks[j]].mean(0)
    exact = oracle.attention(query, key, value, mask, scale=scale)
    rows = np.ones((batch, tokens, heads), bool)
    rows[:, :num_video] = near_ties.most(decided).repeat(8, 2)[:, :, :num_video].swapaxes(1, 2)
    return levels, factor * exact + compensation, decided, rows


@functools.cache
def compiled(text, is_forced=False):
    """Levels and output."""
    rectified = RectifiedSpaAttn(**OPTIONS, text_length=text)
    forced = FORCED if is_forced else None

    @jax.jit
    def call(query, key, value):
        return rectified.select(query, key, forced).levels, rectified(query, key, value, forced=forced)

    return call


def test_equals_loops_with_text(strict_ranks):
    query, key, value = draw()
    levels, output = compiled(13)(query, key, value)
    expected_levels, expected, decided, rows = expect(query, key, value, 13)
    assert set(np.unique(expected_levels)) == {0, 1, 2}
    np.testing.assert_array_equal(levels[decided], expected_levels[decided])
    assert_close(output, expected, "float32", rows)


def test_equals_loops_in_both_dtypes_and_row_by_row(strict_ranks):
    attend = compiled(0, True)
    for dtype, name in ((np.float32, "float32"), (jnp.bfloat16, "bfloat16")):
        query, key, value = draw(0, dtype=dtype)
        levels, output = attend(query, key, value)
        assert output.dtype == dtype
        expected_levels, expected, decided, rows = expect(query, key, value, 0, FORCED)
        np.testing.assert_array_equal(levels[decided], expected_levels[decided])
        assert_close(output, expected, name, rows)
    for array in (query, key, value):
        array[0] = np.nan
    for beside_nan, alone in zip(attend(query, key, value), (levels, output), strict=True):
        np.testing.assert_array_equal(beside_nan[1], alone[1])


def test_published_means_count_zeros_behind_a_short_block():
    """Its keys and queries then weigh as a whole block of smaller means."""
    query, key, _ = draw(text=0)
    shared = {"block_size": 8, "scale": 0.4}
    filled = [np.pad(array, ((0, 0), (0, 4), (0, 0), (0, 0))) for array in (query, key)]
    weigh = jax.jit(RectifiedSpaAttn(**shared).weigh)
    expected, expected_gain = weigh(*filled)
    probability, gain = jax.jit(Published(**shared).weigh)(query, key)
    assert_close(probability, expected, "float32")
    np.testing.assert_array_equal(gain, expected_gain)
    assert np.abs(probability - weigh(query, key)[0]).max() > 1e-3


def test_bad_arguments_are_named():
    query, key, value = draw()
    for options, message in (
        ({"threshold": -0.1}, "threshold must be"),
        ({"text_length": -1}, "text_length must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"block_size": 0}, "block_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            RectifiedSpaAttn(**{**OPTIONS, **options})
    with pytest.raises(ValueError, match="text_length must be below"):
        RectifiedSpaAttn(**OPTIONS, text_length=VIDEO + 13)(query, key, value)
    with pytest.raises(ValueError, match="forced must be"):
        jax.eval_shape(functools.partial(RectifiedSpaAttn(**OPTIONS), forced=np.ones((3, 3), bool)), query, key, value)
