"""Combiner against its p(j | i), built weight by weight in float64, and slopes of that definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.combiner import Combiner
from tests import oracle
from tests.cases import assert_close

BLOCK = 4


def draw(tokens, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, tokens, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, tokens, 2, 8)).astype(dtype)


def weights(query, key, *, is_causal, scale):
    """p(j | i), `[tokens, tokens]`, of one head of one row: query and key `[tokens, head_dim]`."""
    tokens = len(query)
    regions = [range(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    unit = np.eye(tokens)
    inside, summary_key = [], []
    for region in regions:
        members = np.array(region)
        weight = np.exp(scale * key[members] @ query[members].max(0))
        inside.append((weight / weight.sum()) @ unit[members])  # p(j | r) over all tokens
        summary_key.append(key[members].max(0))
    rows = []
    for i in range(tokens):
        row = np.zeros(tokens)
        for r, region in enumerate(regions):
            if i in region:
                for j in region:
                    if j <= i or not is_causal:
                        row += np.exp(scale * query[i] @ key[j]) * unit[j]
            elif region[-1] < i or not is_causal:
                row += np.exp(scale * query[i] @ summary_key[r]) * inside[r]
        rows.append(row / row.sum())
    return np.stack(rows)


def definition(query, key, value, *, is_causal, scale):
    output = np.zeros_like(query)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        p = weights(query[b, :, h], key[b, :, h // 2], is_causal=is_causal, scale=scale)
        output[b, :, h] = p @ value[b, :, h // 2]
    return output


@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_the_factorised_expectation_with_gradients(is_causal, strict_ranks):
    query, key, value = draw(14)
    options = {"is_causal": is_causal, "scale": 0.7}
    d_output = np.random.default_rng(1).standard_normal(query.shape)

    @jax.jit
    def attend(query, key, value):
        output, pullback = jax.vjp(Combiner(block_size=BLOCK, **options), query, key, value)
        return output, pullback(d_output.astype(np.float32))

    output, gradients = attend(query, key, value)
    exact = [array.astype(np.float64) for array in (query, key, value)]
    assert_close(output, definition(*exact, **options), "float32")
    for i, gradient in enumerate(gradients):  # along a random direction of each array
        direction = [np.zeros_like(array) for array in exact]
        direction[i] = np.random.default_rng(i).standard_normal(exact[i].shape)
        expected = oracle.slope(lambda *x: (definition(*x, **options) * d_output).sum(), exact, direction)
        assert_close((np.asarray(gradient) * direction[i]).sum(), expected, "float32")


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_definition_leaves_no_visible_key_out(is_causal):
    query, key, _ = (array.astype(np.float64) for array in draw(14))
    p = weights(query[0, :, 0], key[0, :, 0], is_causal=is_causal, scale=1.0)
    np.testing.assert_array_equal(p > 0, np.tril(np.ones_like(p)) if is_causal else np.ones_like(p))
    np.testing.assert_allclose(p.sum(1), 1)


def test_levels():
    query, key, _ = draw(14)
    causal, both = (Combiner(block_size=5, is_causal=is_causal).select(query, key) for is_causal in (True, False))
    assert causal.levels.shape == (2, 4, 3, 3)
    assert causal.levels.dtype == both.levels.dtype == jnp.int8
    assert causal.levels[1, 3].tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    assert both.levels[1, 3].tolist() == [[1, 2, 2], [2, 1, 2], [2, 2, 1]]


def test_dtype_rows_and_causality():
    query, key, value = draw(14, jnp.bfloat16)
    attend = jax.jit(Combiner(block_size=BLOCK))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    exact = [array.astype(np.float64) for array in (query, key, value)]
    assert_close(output, definition(*exact, is_causal=True, scale=8**-0.5), "bfloat16")
    for array in (query, key, value):
        array[0] = np.nan
        array[1, 6:] += 1
    np.testing.assert_array_equal(attend(query, key, value)[1, :6], output[1, :6])


def test_packed_and_padded_rows_equal_each_sequence_alone(strict_ranks):
    """The ids of the second row are torn apart."""
    query, key, value = draw(14)
    ids, lengths = np.array([[1] * 9 + [0] * 5, np.random.default_rng(1).permutation([1] * 5 + [0] * 9)]), [11, 14]
    query[0, 11:] = np.nan
    attention = Combiner(block_size=BLOCK)
    output = jax.jit(lambda *arrays: attention(*arrays, segment_ids=ids, seq_lengths=lengths))(query, key, value)
    expected = np.zeros(query.shape)
    for row, segment in np.ndindex(2, 2):
        places = np.flatnonzero(ids[row, : lengths[row]] == segment)
        alone = (array[row : row + 1, places].astype(np.float64) for array in (query, key, value))
        expected[row, places] = definition(*alone, is_causal=True, scale=8**-0.5)[0]
    assert_close(output, expected, "float32")


def test_bad_arguments_are_named():
    query, key, value = draw(14)
    with pytest.raises(ValueError, match="block_size"):
        Combiner(block_size=0)
    with pytest.raises(ValueError, match="key must have"):
        Combiner()(query, key[:, 1:], value[:, 1:])
    with pytest.raises(ValueError, match="scale"):
        Combiner(scale=float("nan"))
