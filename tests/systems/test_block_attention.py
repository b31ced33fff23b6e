"""Block-Attention against loops in float64, and a passage's reused cache against recomputing the passage in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.keys import rotate
from sparse_attn.systems.block_attention import BlockAttention
from tests import oracle
from tests.cases import assert_close

LENGTHS = np.array([[9, 0, 14, 7], [3, 20, 4, 10]], np.int32)  # the first row has a passage less and 7 tokens padding
TILES = {"query_block_size": 8, "key_block_size": 4}
SMALL = BlockAttention(**TILES)


def draw(queries=37, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, queries, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, 37, 2, 8)).astype(dtype)


def expected_mask(queries=37):
    mask = np.zeros((2, 4, queries, 37), bool)
    for row, lengths in enumerate(LENGTHS):
        segment = np.repeat(np.arange(4), lengths)
        for t, place in enumerate(range(37 - queries, 37)):
            for s in range(min(place + 1, len(segment))):
                if place < len(segment):
                    mask[row, :, t, s] = segment[s] == segment[place] or segment[place] == 3
    return mask


@pytest.mark.parametrize("queries", [37, 15])
def test_equals_loops_with_values_and_gradients(queries, strict_ranks):
    query, key, value = draw(queries)
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)
    mask = expected_mask(queries)

    @jax.jit
    def attend(query, key, value):
        attention = BlockAttention(**TILES, scale=0.7)
        output, pullback = jax.vjp(lambda *arrays: attention(*arrays, LENGTHS), query, key, value)
        levels = attention.select(query, key, LENGTHS)
        return levels.to_mask(), output, *pullback(d_output)

    expected, gradients = oracle.attention(query, key, value, mask, scale=0.7, d_output=d_output)
    levels, *results = attend(query, key, value)
    for actual, wanted in zip(results, (expected, *gradients), strict=True):
        assert_close(actual, wanted, "float32")
    for i, j in np.ndindex(levels.shape[2:]):
        tile = mask[:, :, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4].any((2, 3))
        np.testing.assert_array_equal(levels[:, :, i, j], tile)


def test_dtype_padding_and_rows():
    query, key, value = draw(dtype=jnp.bfloat16)
    attend = jax.jit(BlockAttention())
    output = attend(query, key, value, LENGTHS)
    assert output.dtype == jnp.bfloat16
    assert_close(output, oracle.attention(query, key, value, expected_mask()), "bfloat16")
    for array in (query, key, value):
        array[0, 30:] = np.nan  # padding of the first row
    np.testing.assert_array_equal(attend(query, key, value, LENGTHS), output)
    for array in (query, key, value):
        array[0] = 7
    np.testing.assert_array_equal(attend(query, key, value, LENGTHS[[1, 1]])[1], output[1])


def test_a_reused_passage_equals_one_recomputed_in_place():
    """Two layers of a little transformer. Each passage is computed once, alone, and its un-rotated keys and its values
    are cached; the prompt then needs the hidden states of the question only."""
    random = np.random.default_rng(2)
    theta = 100.0
    weights = random.standard_normal((2, 3, 32, 32)).astype(np.float32) / 6  # layer, (query, key, value)
    passages = random.standard_normal((2, 1, 9, 32)).astype(np.float32)
    question = random.standard_normal((1, 5, 32)).astype(np.float32)

    @jax.jit
    def run_layer(hidden, lengths, weight, cached):
        """Hidden states after a layer, and its own un-rotated keys and values; cached: those of what stands before."""
        query, *own = ((hidden @ w).reshape(1, -1, 4, 8) for w in weight)
        key, value = (jnp.concatenate([pair[i] for pair in (*cached, own)], axis=1) for i in (0, 1))
        positions = jnp.arange(key.shape[1])[None]
        query = rotate(query, theta, positions[:, -query.shape[1] :])
        key = rotate(key, theta, positions)
        return hidden + SMALL(query, key, value, lengths).reshape(hidden.shape), own

    def run(hidden, lengths, cache):
        own = []
        for weight, cached in zip(weights, cache, strict=True):
            hidden, key_value = run_layer(hidden, lengths, weight, cached)
            own.append(key_value)
        return hidden, own

    prompt = np.concatenate([*passages, question], axis=1)
    in_place, caches = run(prompt, np.array([[9, 9, 5]], np.int32), [[], []])
    alone = [run(passage, np.array([[9]], np.int32), [[], []])[1] for passage in passages]
    reused, _ = run(question, np.array([[9, 9, 5]], np.int32), [[cache[layer] for cache in alone] for layer in (0, 1)])
    assert_close(reused, in_place[:, -5:], "float32")
    for layer, i, kind in np.ndindex(2, 2, 2):
        assert_close(alone[i][layer][kind], caches[layer][kind][:, 9 * i : 9 * i + 9], "float32")


def test_keys_cached_after_rotation_move_by_the_difference():
    key = np.random.default_rng(3).standard_normal((1, 6, 2, 8)).astype(np.float32)
    first, then = np.arange(6)[None], np.arange(6)[None] + 17
    turn = jax.jit(lambda array, positions: rotate(array, 100.0, positions))
    moved = turn(turn(key, first), then - first)
    assert_close(moved, turn(key, then), "float32")
    assert_close(turn(moved, -then), key, "float32")


def test_bad_arguments_are_named():
    query, key, value = draw()
    with pytest.raises(ValueError, match="segment_lengths"):
        SMALL(query, key, value, LENGTHS[0])
    with pytest.raises(ValueError, match="segment_lengths"):
        SMALL(query, key, value, LENGTHS.astype(np.float32))
    with pytest.raises(ValueError, match="query_block_size"):
        BlockAttention(query_block_size=0)
    with pytest.raises(ValueError, match="value"):
        SMALL(query, key, value[:, 1:], LENGTHS)
    for name, rows in {"segment_ids": np.zeros((2, 37), int), "seq_lengths": np.array([30, 37])}.items():
        with pytest.raises(ValueError, match=f"{name} must be None: segment_lengths says"):
            SMALL(query, key, value, LENGTHS, **{name: rows})
