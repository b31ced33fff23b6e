"""NSA against three dense attentions in float64, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar import choose
from sparse_attn.systems import nsa
from sparse_attn.systems.nsa import NSA
from tests import near_ties, oracle
from tests.cases import assert_close

SIZE, TOP_K, WINDOW, SCALE = 4, 3, 5, 0.6
ATTENTION = NSA(block_size=SIZE, top_k=TOP_K, window_size=WINDOW, scale=SCALE)


@pytest.fixture(autouse=True)
def several_uneven_tiles(monkeypatch):
    monkeypatch.setattr(nsa, "_TILE_SIZE", 4)


def draw(dtype=np.float32, tokens=22, seed=0):
    """Two rows, two key/value heads of two query heads each; 22 tokens are 5 blocks and a half."""
    random = np.random.default_rng(seed)
    query, d_output = random.standard_normal((2, 2, tokens, 4, 8)).astype(dtype)
    key, value = random.standard_normal((2, 2, tokens, 2, 8)).astype(dtype)
    return query, key, value, random.random((2, tokens, 4, 3)).astype(dtype), d_output


@jax.jit
def differentiate(query, key, value, gates, d_output, **sequences):
    """Output and the gradients of query, key, value and gates."""
    attend = functools.partial(ATTENTION, **sequences)
    output, pull_back = jax.vjp(attend, query, key, value, gates)
    return output, *pull_back(d_output)


def means_of(array):
    """Means of the blocks that have ended, float64 [batch, blocks, kv_heads, d]."""
    batch, tokens, *rest = array.shape
    array = array.astype(np.float64)[:, : tokens // SIZE * SIZE]
    return array.reshape(batch, tokens // SIZE, SIZE, *rest).mean(2)


def masks(query, key):
    """What each branch attends, bool [batch, heads, tokens, blocks or tokens]: compressed, selected, window.

    And the queries whose blocks no rounding changes, bool [batch, tokens, heads].
    """
    batch, tokens, heads, _ = query.shape
    means, sizes, group = means_of(key), means_of(np.abs(key)), heads // key.shape[2]
    compressed = np.zeros((batch, heads, tokens, means.shape[1]), bool)
    selected, window = np.zeros((2, batch, heads, tokens, tokens), bool)
    decided = np.zeros((batch, tokens, heads), bool)
    for b, kv_head, t in np.ndindex(batch, key.shape[2], tokens):
        ended, own = (t + 1) // SIZE, t // SIZE
        heads_of_group = slice(kv_head * group, (kv_head + 1) * group)
        scores, error = np.zeros((2, own))
        for h in range(kv_head * group, (kv_head + 1) * group if own else 0):
            q, mean = query[b, t, h].astype(np.float64), means[b, :ended, kv_head]
            size = SCALE * sizes[b, :ended, kv_head] @ np.abs(q)
            # Rounded are the mean of 4, the product of 8, its scale, and below the sum of two heads.
            weights, errors = near_ties.softmax(SCALE * mean @ q, near_ties.dot_error(q, mean, size, 4 + 1 + 8 + 1))
            scores, error = scores + weights[:own], error + errors[:own] + near_ties.UNIT * weights[:own]
        others = np.argsort(-scores, kind="stable")[: TOP_K - 1]
        chosen = [own, *others]
        decided[b, t, heads_of_group] = near_ties.is_decided(scores, error, np.isin(np.arange(own), others))
        compressed[b, heads_of_group, t, :ended] = True
        for s in range(t + 1):
            selected[b, heads_of_group, t, s] = s // SIZE in chosen
            window[b, heads_of_group, t, s] = t - s < WINDOW
    return (compressed, selected, window), near_ties.most(decided)


def test_choice_equals_loops(strict_ranks):
    query, key, *_ = draw()
    selection = jax.jit(ATTENTION.select)(query, key)
    chosen = np.asarray(selection.to_mask()).repeat(SIZE, axis=-1)[..., :22] & np.tril(np.ones((22, 22), bool))
    (_, selected, _), decided = masks(query, key)
    decided = decided.swapaxes(1, 2)
    np.testing.assert_array_equal(chosen[decided], selected[decided])
    indices = np.asarray(selection.indices)
    np.testing.assert_array_equal(indices[..., 0], np.broadcast_to(np.arange(22) // SIZE, (2, 4, 22)))
    assert indices[:, :, :SIZE, 1:].max() == -1


def test_the_own_block_is_kept_where_another_has_all_the_weight():
    query, key, *_ = draw()
    attention = dataclasses.replace(ATTENTION, top_k=1)
    indices = jax.jit(attention.select)(query, key).indices
    np.testing.assert_array_equal(indices[..., 0], np.broadcast_to(np.arange(22) // SIZE, (2, 4, 22)))


@pytest.mark.parametrize("tokens", [22, 3])
def test_output_and_gradients_equal_three_dense_attentions(tokens, strict_ranks):
    query, key, value, gates, d_output = draw(tokens=tokens)
    branches, decided = masks(query, key)
    d_output = np.where(decided[..., None], d_output, 0)

    output, *actual = differentiate(query, key, value, gates, d_output)
    expected, gradients = 0, [np.zeros(array.shape) for array in (query, key, value, gates)]
    for branch, mask in enumerate(branches):
        keys = (means_of(key), means_of(value)) if branch == 0 else (key, value)
        gate = gates[..., branch, None].astype(np.float64)
        result, (d_query, *d_keys) = oracle.attention(query, *keys, mask, scale=SCALE, d_output=gate * d_output)
        expected += gate * result
        gradients[0] += d_query
        for place, gradient in enumerate(d_keys, 1):
            if branch == 0:
                gradients[place][:, : tokens // SIZE * SIZE] += gradient.repeat(SIZE, axis=1) / SIZE
            else:
                gradients[place] += gradient
        gradients[3][..., branch] = (result * d_output).sum(-1)
    assert_close(output, expected, "float32", decided)
    for one, other in zip(actual, gradients, strict=True):
        assert_close(one, other, "float32")


def test_dtype_rows_and_no_window():
    query, key, value, gates, _ = draw(jnp.bfloat16)
    attend = jax.jit(dataclasses.replace(ATTENTION, window_size=0))
    output = attend(query, key, value, gates)
    assert output.dtype == jnp.bfloat16
    branches, decided = masks(query, key)
    compressed = oracle.attention(query, means_of(key), means_of(value), branches[0], scale=SCALE)
    selected = oracle.attention(query, key, value, branches[1], scale=SCALE)
    gates64 = gates.astype(np.float64)
    assert_close(output, gates64[..., :1] * compressed + gates64[..., 1:2] * selected, "bfloat16", decided)
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value, gates)[1], output[1])


def test_queries_taken_a_few_at_a_time_give_the_same(monkeypatch):
    query, key, *_ = draw()
    whole = ATTENTION.select(query, key)
    monkeypatch.setattr(choose, "_ELEMENTS_PER_STEP", 5 * 2 * 4 * 6)
    parts, decided = ATTENTION.select(query, key), masks(query, key)[1].swapaxes(1, 2)
    np.testing.assert_array_equal(parts.to_mask()[decided], whole.to_mask()[decided])


def test_packed_and_padded_rows_equal_each_sequence_alone(strict_ranks):
    arrays = draw(tokens=27)  # query, key, value, gates and the cotangent
    random = np.random.default_rng(1)
    ids = np.array([[3] * 22 + [-1] * 3 + [-1] * 2, random.permutation([7] * 2 + [-1] * 3 + [3] * 22)])
    lengths = np.array([25, 27])
    for array in arrays:
        array[0, 25:] = np.nan
    arrays[-1][0, 25:] = 1
    results = [np.asarray(array) for array in differentiate(*arrays, segment_ids=ids, seq_lengths=lengths)]
    for segment in (3, -1):
        places = np.stack([np.flatnonzero(ids[b, : lengths[b]] == segment) for b in range(2)])
        alone = differentiate(*(array[[[0], [1]], places] for array in arrays))
        for one, other in zip(results, alone, strict=True):
            assert_close(one[[[0], [1]], places], np.asarray(other), "float32")
    for array in results:
        assert not array[0, 25:].any()


def test_bad_arguments_are_named():
    query, key, value, gates, _ = draw()
    for options, name in (({"block_size": 0}, "block_size"), ({"top_k": 0}, "top_k"), ({"window_size": -1}, "window")):
        with pytest.raises(ValueError, match=name):
            NSA(**options)
    with pytest.raises(ValueError, match="gates"):
        NSA()(query, key, value, gates[..., :2])
    with pytest.raises(ValueError, match="key must have"):
        NSA()(query[:, 1:], key, value, gates[:, 1:])
