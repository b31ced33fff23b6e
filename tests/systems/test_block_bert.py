"""BlockBERT against loops in float64: permutations, ragged blocks, tiles inside blocks, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems import block_bert
from sparse_attn.systems.block_bert import BlockBERT, shifts
from tests import oracle
from tests.cases import assert_close

PERMUTATIONS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1))


def draw(tokens, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, tokens, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, tokens, 2, 8)).astype(dtype)


def expected_mask(tokens):
    block = -(-tokens // 3)
    mask = np.zeros((2, 4, tokens, tokens), bool)
    for head, t, s in np.ndindex(4, tokens, tokens):
        mask[:, head, t, s] = s // block == PERMUTATIONS[head][t // block]
    return mask


@pytest.mark.parametrize(("tokens", "largest_tile"), [(24, 128), (32, 4)])
def test_equals_loops_with_gradients(tokens, largest_tile, strict_ranks, monkeypatch):
    """Whole blocks; and a short last block with tiles that do not divide a block."""
    monkeypatch.setattr(block_bert, "_LARGEST_TILE", largest_tile)
    query, key, value = draw(tokens)
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)

    @jax.jit
    def attend(query, key, value):
        attention = BlockBERT(permutations=PERMUTATIONS, scale=0.7)
        output, pullback = jax.vjp(attention, query, key, value)
        return attention.select(query, key), output, *pullback(d_output)

    levels, *results = attend(query, key, value)
    mask = expected_mask(tokens)
    expected, gradients = oracle.attention(query, key, value, mask, scale=0.7, d_output=d_output)
    for actual, wanted in zip(results, (expected, *gradients), strict=True):
        assert_close(actual, wanted, "float32")
    chosen = np.asarray(levels.to_mask()).repeat(levels.query_block_size, 2).repeat(levels.key_block_size, 3)
    np.testing.assert_array_equal(chosen[:, :, :tokens, :tokens], mask)


def test_shifts():
    assert shifts((2, 1, 1)) == ((0, 1, 2), (0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert BlockBERT().permutations == ((0, 1),) * 10 + ((1, 0),) * 2


def test_dtype_and_rows():
    query, key, value = draw(25, jnp.bfloat16)
    attend = jax.jit(BlockBERT(permutations=PERMUTATIONS))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    assert_close(output, oracle.attention(query, key, value, expected_mask(25)), "bfloat16")
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value)[1], output[1])


def test_bad_arguments_are_named():
    query, key, value = draw(24)
    for permutations in (PERMUTATIONS[:3], ((0, 1),) * 3 + ((1, 1),), ((0, 1),) * 3 + ((0, 1, 2),), ()):
        with pytest.raises(ValueError, match="permutations must hold"):
            BlockBERT(permutations=permutations)(query, key, value)
    with pytest.raises(ValueError, match="empty with 5 tokens"):
        BlockBERT(permutations=((0, 1, 2, 3),) * 4)(query[:, :5], key[:, :5], value[:, :5])
    with pytest.raises(ValueError, match="key must have"):
        BlockBERT(permutations=PERMUTATIONS)(query, key[:, 1:], value[:, 1:])
