"""Orion-MSP's pattern against loops in float64, and the drawing of its links."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.orion_msp import OrionMSP
from tests import oracle
from tests.cases import assert_close

TOKENS = 75  # more than a tile


def draw(dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, TOKENS, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, TOKENS, 2, 8)).astype(dtype)


def draw_links(seed=1):
    """Distinct tokens of any kind, some missing: also special ones, the query itself and its neighbours."""
    random = np.random.default_rng(seed)
    links = np.stack([random.permutation(TOKENS)[:6] for _ in range(TOKENS)])
    return np.where(random.random(links.shape) < 0.2, -1, links).astype(np.int32)


def expected_mask(links, num_special, window):
    mask = np.zeros((2, 4, TOKENS, TOKENS), bool)
    for t, s in np.ndindex(TOKENS, TOKENS):
        mask[:, :, t, s] = min(t, s) < num_special or abs(t - s) <= window or s in links[t]
    return mask


@pytest.mark.parametrize(("num_special", "window"), [(5, 3), (0, 0)])
def test_equals_loops_with_gradients(num_special, window, strict_ranks):
    (query, key, value), links = draw(), draw_links()
    d_output = np.random.default_rng(2).standard_normal(query.shape).astype(np.float32)
    sizes = {"num_special": num_special, "window": window}

    @jax.jit
    def attend(query, key, value, d_output):
        attention = OrionMSP(**sizes, scale=0.7)
        output, pullback = jax.vjp(lambda *arrays: attention(*arrays, links), query, key, value)
        return attention.select(query, key, links).levels, output, *pullback(d_output)

    mask = expected_mask(links, **sizes)
    expected, gradients = oracle.attention(query, key, value, mask, scale=0.7, d_output=d_output)
    levels, *results = attend(query, key, value, d_output)
    for actual, wanted in zip(results, (expected, *gradients), strict=True):
        assert_close(actual, wanted, "float32")
    np.testing.assert_array_equal(levels, mask)


def test_dtype_rows_and_no_links():
    query, key, value = draw(jnp.bfloat16)
    attend = jax.jit(OrionMSP(num_special=80))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    mask = np.ones((2, 4, TOKENS, TOKENS), bool)
    assert_close(output, oracle.attention(query, key, value, mask), "bfloat16")
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value)[1], output[1])


def test_packed_and_padded_rows_equal_each_sequence_alone():
    (query, key, value), links = draw(), draw_links()
    ids, lengths = np.repeat([[4, 1], [3, 3]], [40, TOKENS - 40], axis=1), np.array([TOKENS, 50])
    orion = OrionMSP(num_special=5, window=3)
    arrays = [np.array(array) for array in (query, key, value)]
    for array in arrays:
        array[1, 50:] = np.nan
    output = jax.jit(lambda *arrays: orion(*arrays, links, segment_ids=ids, seq_lengths=lengths))(*arrays)
    for row, sequence in ((0, slice(0, 40)), (0, slice(40, TOKENS)), (1, slice(0, 50))):
        num_tokens = sequence.stop - sequence.start
        mask = expected_mask(links, 5, 3)[:1, :, :num_tokens, :num_tokens]
        alone = oracle.attention(*(array[row : row + 1, sequence] for array in (query, key, value)), mask)
        assert_close(output[row : row + 1, sequence], alone, "float32")
    np.testing.assert_array_equal(output[1, 50:], 0)


def test_links_are_distinct_and_every_set_is_equally_likely():
    keys = jax.random.split(jax.random.key(0), 2000)
    links = jax.jit(jax.vmap(lambda key: OrionMSP(num_special=3).draw_links(key, 8)))(keys)
    np.testing.assert_array_equal(links[:, :3], -1)
    counts = collections.Counter(frozenset(pair) for pair in np.asarray(links[:, 3:]).reshape(-1, 2).tolist())
    assert set(counts) == {frozenset(pair) for pair in itertools.combinations(range(3, 8), 2)}
    expected = 5 * 2000 / 10
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())  # five standard deviations


def test_links_run_out():
    draw_links = jax.jit(OrionMSP(num_special=4, num_random=3).draw_links, static_argnums=1)
    links = draw_links(jax.random.key(0), 6)
    assert [sorted(row) for row in links.tolist()] == [[-1, -1, -1]] * 4 + [[-1, 4, 5]] * 2
    assert OrionMSP(num_random=0).draw_links(jax.random.key(0), 6).shape == (6, 0)
    np.testing.assert_array_equal(OrionMSP(num_special=4).draw_links(jax.random.key(0), 3), -1)


def test_bad_arguments_are_named():
    query, key, value = draw()
    for name, call in {
        "num_special": lambda: OrionMSP(num_special=-1),
        "window": lambda: OrionMSP(window=1.5),
        "links": lambda: OrionMSP()(query, key, value, draw_links()[1:]),
        "num_random": lambda: OrionMSP(num_random=-1),
        "key must have": lambda: OrionMSP()(query, key[:, 1:], value[:, 1:]),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
