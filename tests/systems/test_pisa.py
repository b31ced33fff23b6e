"""PISA against loops in float64: choice, the expansion of the tail, grouped heads, a ragged row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.pisa import PISA
from tests import near_ties
from tests.cases import assert_close
from tests.systems.check_pisa import Published


def draw(tokens=76, heads=4, kv_heads=2, dtype=np.float32, seed=0):
    """Exact means, products of means and moments; the last of ten blocks has 4 tokens."""
    random = np.random.default_rng(seed)
    query = near_ties.eighths(random.standard_normal((2, tokens, heads, 4))).astype(dtype)
    return query, *near_ties.eighths(random.standard_normal((2, 2, tokens, kv_heads, 4))).astype(dtype)


def expect(query, key, value, *, top_k, block_size, use_moment_norm, scale, group_size=None):
    """Levels, output and which rows of levels are decided, by loops.

    With group_size the tail's mass is left at the running maximum of each group.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    blocks = [slice(start, min(start + block_size, tokens)) for start in range(0, tokens, block_size)]
    levels, output = np.zeros((batch, heads, len(blocks), len(blocks)), int), np.zeros(query.shape)
    decided = np.ones(levels.shape[:3], bool)
    for b, h in np.ndindex(batch, heads):
        q, k, v = query[b, :, h], key[b, :, h * key.shape[2] // heads], value[b, :, h * key.shape[2] // heads]
        means = [k[block].mean(0) for block in blocks]
        moments = [(k[block] - mean).T @ v[block] for block, mean in zip(blocks, means, strict=True)]
        norms = np.array([np.sqrt((moment**2).sum()) for moment in moments])
        for i, rows in enumerate(blocks):
            scores = scale * np.array([q[rows].mean(0) @ mean for mean in means])
            if use_moment_norm:
                scores = scores + np.log(norms + 1e-5)
            if use_moment_norm:  # 16 squares, a root, a sum and its log are rounded, and what comes of them
                error = near_ties.UNIT * (20 + np.abs(scores) + 2 * np.abs(np.log(norms + 1e-5)))
                scores, error = near_ties.softmax(scores, error)
            levels[b, h, i, np.argsort(-scores, kind="stable")[:top_k]] = 1
            if use_moment_norm:
                decided[b, h, i] = near_ties.is_decided(scores, error, levels[b, h, i] == 1)
            for t in range(rows.start, rows.stop):
                exact = [
                    s for j, block in enumerate(blocks) if levels[b, h, i, j] for s in range(*block.indices(tokens))
                ]
                logits = scale * k[exact] @ q[t]
                running = logits.max()
                numerator, mass, tail = np.exp(logits) @ v[exact], np.exp(logits).sum(), 0.0
                published = 0.0  # in units of exp(running maximum)
                for start in range(0, len(blocks), group_size or len(blocks)):
                    group = range(start, min(start + (group_size or len(blocks)), len(blocks)))
                    others = [j for j in group if not levels[b, h, i, j]]
                    running = max([running] + [scale * q[t] @ means[j] for j in others])
                    for j in others:
                        weight = np.exp(scale * q[t] @ means[j])
                        count = blocks[j].stop - blocks[j].start
                        numerator = numerator + weight * v[blocks[j]].sum(0)
                        tail += weight * count
                        published += weight * count * np.exp(-running)
                if group_size:
                    tail = published * np.exp(running)
                numerator = numerator + tail * scale / tokens * (q[t] @ sum(moments))
                output[b, t, h] = numerator / (mass + tail)
    return levels, output, decided


@functools.cache
def compiled(**options):
    """Levels and output."""
    pisa = PISA(**options)
    return jax.jit(lambda query, key, value: (pisa.select(query, key).levels, pisa(query, key, value)))


def test_equals_loops_in_both_dtypes_and_row_by_row(strict_ranks):
    attend = compiled(density=0.39, block_size=8, scale=0.9)
    for dtype, name in ((np.float32, "float32"), (jnp.bfloat16, "bfloat16")):
        query, key, value = draw(dtype=dtype)
        levels, output = attend(query, key, value)
        assert output.dtype == dtype
        expected = expect(query, key, value, top_k=3, block_size=8, use_moment_norm=False, scale=0.9)  # int(0.39 * 10)
        np.testing.assert_array_equal(levels, expected[0])
        assert_close(output, expected[1], name)
    for array in (query, key, value):
        array[0] = np.nan
    for beside_nan, alone in zip(attend(query, key, value), (levels, output), strict=True):
        np.testing.assert_array_equal(beside_nan[1], alone[1])


def test_choice_by_the_norm_of_moments_equals_loops(strict_ranks):
    query, key, value = draw()
    options = {"block_size": 8, "use_moment_norm": True, "scale": 0.9}
    pisa = PISA(density=0.39, **options)
    levels, _, decided = expect(query, key, value, top_k=3, **options)
    decided = near_ties.most(decided)
    np.testing.assert_array_equal(jax.jit(pisa.select)(query, key, value).levels[decided], levels[decided])
    assert (levels != expect(query, key, value, top_k=3, **{**options, "use_moment_norm": False})[0]).any()
    with pytest.raises(ValueError, match="value must be given"):
        pisa.select(query, key)


def test_published_mass_of_the_tail():
    query, key, value = draw(tokens=60, heads=2)
    options = {"block_size": 8, "scale": 3.0}
    _, output, _ = expect(query, key, value, top_k=1, group_size=3, use_moment_norm=False, **options)
    published = jax.jit(Published(density=0.0, group_size=3, **options))
    assert_close(published(query, key, value), output, "float32")
    _, corrected, _ = expect(query, key, value, top_k=1, use_moment_norm=False, **options)
    assert np.abs(corrected - output).max() > 1e-2


def test_everything_exact_is_dense_attention():
    query, key, value = draw(tokens=16)
    expected = jax.nn.dot_product_attention(query, key, value)
    assert_close(jax.jit(PISA(density=1.0, block_size=8))(query, key, value), expected, "float32")


def test_bad_arguments_are_named():
    query, key, value = draw()
    with pytest.raises(ValueError, match="density must be"):
        PISA(density=1.5)
    with pytest.raises(ValueError, match="block_size"):
        PISA(block_size=0)
    with pytest.raises(ValueError, match="key must have"):
        PISA()(query, key[:, 1:], value[:, 1:])
