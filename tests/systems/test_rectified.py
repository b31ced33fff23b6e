"""Rectified SpaAttn against loops in float64: pooled attention, choice, compensation, text, short last blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar import order
from sparse_attn.systems import rectified
from tests import oracle
from tests.cases import assert_close

GRID = (3, 5, 5)  # 75 tokens: ten blocks of 8, the last of 3
FORCED = order.neighbouring_blocks(GRID, order.space_filling_curve(GRID), 8) & (np.arange(10) % 3 == 0)
OPTIONS = {"block_size": 8, "threshold": 0.4, "top_k": 2}


def draw(text=13, dtype=np.float32, seed=0):
    """Blocks of the video have a common part, so that some gain from pooling."""
    random = np.random.default_rng(seed)
    query, key, value = random.standard_normal((3, 2, 75 + text, 4, 8))
    for array in (query, key):
        centre = 1.5 * random.standard_normal((2, 12, 4, 8))
        array += (
            centre[:, np.arange(75 + text) // 8] * random.uniform(0, 1, (2, 12, 1, 1))[:, np.arange(75 + text) // 8]
        )
    return query.astype(dtype), key[:, :, :2].astype(dtype), value[:, :, :2].astype(dtype)


def expect(query, key, value, text, forced=None, scale=8**-0.5):
    """Levels of the video and output of all tokens, by definition."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    num_video = tokens - text
    blocks = [slice(start, min(start + 8, num_video)) for start in range(0, num_video, 8)]
    levels = np.zeros((batch, heads, len(blocks), len(blocks)), int)
    mask = np.ones((batch, heads, tokens, tokens), bool)
    factor, compensation = np.ones((batch, tokens, heads, 1)), np.zeros(query.shape)
    for b, h, i in np.ndindex(batch, heads, len(blocks)):
        q, k, v = query[b, blocks[i], h], key[b, :, h // 2], value[b, :, h // 2]
        mean, spread = q.mean(0), np.abs(q - q.mean(0)).mean(0)
        weight, gains = [], []
        for block in blocks:
            key_mean = k[block].mean(0)
            key_spread = np.abs(k[block] - key_mean).mean(0)
            weight.append(len(k[block]) * np.exp(scale * mean @ key_mean))
            gains.append(abs(mean @ key_mean) > abs(spread @ key_mean) + abs(mean @ key_spread))
        weight.append(sum(np.exp(scale * mean @ k[s]) for s in range(num_video, tokens)))
        share = np.array(weight) / sum(weight)
        ranking = np.argsort(-share, kind="stable")
        count = max(2, next(n for n in range(1, len(share) + 1) if share[ranking[:n]].sum() >= 0.4))
        for j in range(len(blocks)):
            is_kept = j in ranking[:count] or (forced is not None and forced[i, j])
            levels[b, h, i, j] = 1 if is_kept else 2 * gains[j]
            mask[b, h, blocks[i], blocks[j]] = is_kept
            if levels[b, h, i, j] == 2:
                factor[b, blocks[i], h] -= share[j]
                compensation[b, blocks[i], h] += share[j] * v[blocks[j]].mean(0)
    exact = oracle.attention(query, key, value, mask, scale=scale)
    return levels, factor * exact + compensation


@functools.cache
def compiled(text, forced=False):
    options = {**OPTIONS, "text_length": text}

    @jax.jit
    def call(query, key, value):
        pairs = {"forced": FORCED} if forced else {}
        levels = rectified.select(query, key, **options, **pairs)
        return levels.levels, rectified.attention(query, key, value, **options, **pairs)

    return call


def test_equals_loops_with_text(strict_ranks):
    query, key, value = draw()
    levels, output = compiled(13)(query, key, value)
    expected_levels, expected = expect(query, key, value, 13)
    assert set(np.unique(expected_levels)) == {0, 1, 2}
    np.testing.assert_array_equal(levels, expected_levels)
    assert_close(output, expected, "float32")


def test_equals_loops_in_both_dtypes_and_row_by_row(strict_ranks):
    attend = compiled(0, True)
    for dtype, name in ((np.float32, "float32"), (jnp.bfloat16, "bfloat16")):
        query, key, value = draw(0, dtype=dtype)
        levels, output = attend(query, key, value)
        assert output.dtype == dtype
        expected_levels, expected = expect(query, key, value, 0, FORCED)
        np.testing.assert_array_equal(levels, expected_levels)
        assert_close(output, expected, name)
    for array in (query, key, value):
        array[0] = np.nan
    for beside_nan, alone in zip(attend(query, key, value), (levels, output), strict=True):
        np.testing.assert_array_equal(beside_nan[1], alone[1])


def test_published_means_count_zeros_behind_a_short_block():
    """Its keys and queries then weigh as a whole block of smaller means."""
    query, key, _ = draw(text=0)
    shared = {"block_size": 8, "text_length": 0, "scale": 0.4}
    filled = [np.pad(array, ((0, 0), (0, 5), (0, 0), (0, 0))) for array in (query, key)]
    weigh = functools.partial(jax.jit(rectified.weigh, static_argnames=(*shared, "as_published")), **shared)
    expected, expected_gain = weigh(*filled, as_published=False)
    probability, gain = weigh(query, key, as_published=True)
    assert_close(probability, expected, "float32")
    np.testing.assert_array_equal(gain, expected_gain)
    assert np.abs(probability - weigh(query, key, as_published=False)[0]).max() > 1e-3


def test_bad_arguments_are_named():
    query, key, value = draw()
    for options, message in (
        ({"threshold": -0.1}, "threshold must be"),
        ({"text_length": 88}, "text_length must be"),
        ({"forced": np.ones((3, 3), bool)}, "forced must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"block_size": 0}, "block_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(rectified.attention, **{**OPTIONS, **options}), query, key, value)
