"""Combiner against its p(j | i), built weight by weight in float64, and gradients of that definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems import combiner
from tests.cases import assert_close

BLOCK = 4


def draw(tokens, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, tokens, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, tokens, 2, 8)).astype(dtype)


def weights(query, key, *, is_causal, scale, xp=np):
    """p(j | i), `[tokens, tokens]`, of one head of one row: query and key `[tokens, head_dim]`.

    xp is NumPy, or JAX to be differentiated.
    """
    tokens = len(query)
    regions = [range(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    unit = np.eye(tokens)
    inside, summary_key = [], []
    for region in regions:
        members = np.array(region)
        weight = xp.exp(scale * key[members] @ query[members].max(0))
        inside.append((weight / weight.sum()) @ unit[members])  # p(j | r) over all tokens
        summary_key.append(key[members].max(0))
    rows = []
    for i in range(tokens):
        row = 0
        for r, region in enumerate(regions):
            if i in region:
                for j in region:
                    if j <= i or not is_causal:
                        row += xp.exp(scale * query[i] @ key[j]) * unit[j]
            elif region[-1] < i or not is_causal:
                row += xp.exp(scale * query[i] @ summary_key[r]) * inside[r]
        rows.append(row / row.sum())
    return xp.stack(rows)


def definition(query, key, value, *, is_causal, scale, xp=np):
    batch, _, heads, _ = query.shape
    group = heads // key.shape[2]
    p = [
        [weights(query[b, :, h], key[b, :, h // group], is_causal=is_causal, scale=scale, xp=xp) for h in range(heads)]
        for b in range(batch)
    ]
    return xp.stack([xp.stack([p[b][h] @ value[b, :, h // group] for h in range(heads)], axis=1) for b in range(batch)])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("tokens", [16, 14])
def test_equals_the_factorised_expectation(tokens, is_causal, strict_ranks):
    query, key, value = draw(tokens)
    options = {"is_causal": is_causal, "scale": 0.7}
    output = jax.jit(functools.partial(combiner.attention, block_size=BLOCK, **options))(query, key, value)
    exact = [array.astype(np.float64) for array in (query, key, value)]
    assert_close(output, definition(*exact, **options), "float32")
    p = weights(exact[0][0, :, 0], exact[1][0, :, 0], **options)
    assert ((p > 0) == (np.tril(np.ones_like(p)) if is_causal else 1)).all()  # the oracle leaves no key out
    np.testing.assert_allclose(p.sum(1), 1)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_equal_those_of_the_definition_in_float64(is_causal):
    query, key, value = (array[:1] for array in draw(10))
    query, key, value = query[:, :, :2], key[:, :, :1], value[:, :, :1]
    d_output = np.random.default_rng(1).standard_normal(query.shape)
    options = {"is_causal": is_causal, "scale": 0.5}
    call = functools.partial(combiner.attention, block_size=BLOCK, **options)
    actual = jax.jit(jax.grad(lambda *x: (call(*x) * d_output).sum(), (0, 1, 2)))(query, key, value)
    with jax.enable_x64(True):
        expected = jax.jit(jax.grad(lambda *x: (definition(*x, **options, xp=jnp) * d_output).sum(), (0, 1, 2)))(
            *(array.astype(np.float64) for array in (query, key, value))
        )
        expected = [np.asarray(array) for array in expected]
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, "float32")


def test_levels():
    query, key, _ = draw(14)
    causal, both = (combiner.select(query, key, block_size=5, is_causal=is_causal) for is_causal in (True, False))
    assert causal.levels.shape == (2, 4, 3, 3)
    assert causal.levels.dtype == both.levels.dtype == jnp.int8
    assert causal.levels[1, 3].tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    assert both.levels[1, 3].tolist() == [[1, 2, 2], [2, 1, 2], [2, 2, 1]]


def test_dtype_and_rows():
    query, key, value = draw(14, jnp.bfloat16)
    attend = jax.jit(functools.partial(combiner.attention, block_size=BLOCK))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    exact = [array.astype(np.float64) for array in (query, key, value)]
    assert_close(output, definition(*exact, is_causal=True, scale=8**-0.5), "bfloat16")
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value)[1], output[1])


def test_the_past_does_not_depend_on_the_future():
    query, key, value = draw(16)
    attend = jax.jit(functools.partial(combiner.attention, block_size=BLOCK))
    output = attend(query, key, value)
    for array in (query, key, value):
        array[:, 6:] += 1
    np.testing.assert_array_equal(attend(query, key, value)[:, :6], output[:, :6])


def test_bad_arguments_are_named():
    query, key, value = draw(14)
    with pytest.raises(ValueError, match="block_size"):
        combiner.attention(query, key, value, block_size=0)
    with pytest.raises(ValueError, match="key must have"):
        combiner.attention(query, key[:, 1:], value[:, 1:])
    with pytest.raises(ValueError, match="scale"):
        combiner.attention(query, key, value, scale=float("nan"))
