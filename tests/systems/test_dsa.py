"""DSA against loops in float64, and its loss against slopes of the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar import choose
from sparse_attn.systems.dsa import DSA, Indexer
from tests import near_ties, oracle
from tests.cases import assert_close

TOP_K = 5


def draw(dtype=np.float32, queries=19, keys=19, seed=0):
    """Two rows; four heads over two key/value heads; three index heads.

    The indexer's scores are exact, and no product is at 0, where relu has no slope: it is a sum of five odd multiples.
    """
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, queries, 4, 8)).astype(dtype)
    key, value = random.standard_normal((2, 2, keys, 2, 8)).astype(dtype)
    index_query, index_key = (
        ((2 * np.floor(4 * random.standard_normal(shape)) + 1) / 8).astype(dtype)
        for shape in ((2, queries, 3, 5), (2, keys, 5))
    )
    weight = near_ties.eighths(random.standard_normal((2, queries, 3))).astype(dtype)
    return query, key, value, Indexer(index_query, index_key, weight)


def scores_by_loops(indexer):
    """float64 [batch, queries, keys]."""
    query, key, weight = (np.asarray(array, np.float64) for array in indexer)
    scores = np.zeros((*query.shape[:2], key.shape[1]))
    for b, t, h, s in np.ndindex(*query.shape[:3], key.shape[1]):
        scores[b, t, s] += weight[b, t, h] * max(0, query[b, t, h] @ key[b, s])
    return scores


def lists_by_loops(indexer, is_causal, top_k=TOP_K):
    """Listed keys in their order, [batch][queries]."""
    scores = scores_by_loops(indexer)
    _, queries, keys = scores.shape
    seen = [t + 1 + keys - queries if is_causal else keys for t in range(queries)]
    return [[np.argsort(-row[t, : max(0, seen[t])], kind="stable")[:top_k] for t in range(queries)] for row in scores]


def mask_of(lists, keys):
    """bool [batch, 4 heads, queries, keys]."""
    mask = np.zeros((len(lists), 4, len(lists[0]), keys), bool)
    for b, row in enumerate(lists):
        for t, listed in enumerate(row):
            mask[b, :, t, listed] = True
    return mask


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(19, 19), (3, 19), (19, 13)])
def test_choice_and_output_equal_loops(queries, keys, is_causal, strict_ranks):
    query, key, value, indexer = draw(queries=queries, keys=keys)
    attention = DSA(top_k=TOP_K, is_causal=is_causal, scale=0.6)
    selection = jax.jit(attention.select)(indexer)
    lists = lists_by_loops(indexer, is_causal)
    for b, t in np.ndindex(2, queries):
        expected = [*lists[b][t], *[-1] * TOP_K][:TOP_K]
        np.testing.assert_array_equal(selection.indices[b, 0, t], expected)
    output = jax.jit(attention)(query, key, value, indexer)
    assert_close(output, oracle.attention(query, key, value, mask_of(lists, keys), scale=0.6), "float32")


def test_queries_taken_a_few_at_a_time_give_the_same(monkeypatch):
    query, key, _, indexer = draw()
    attention = DSA(top_k=TOP_K)
    selection = attention.select(indexer)
    loss = attention.indexer_loss(query, key, indexer, selection)
    monkeypatch.setattr(choose, "_ELEMENTS_PER_STEP", 4 * 2 * 3 * 19)
    np.testing.assert_array_equal(attention.select(indexer).indices, selection.indices)
    assert_close(attention.indexer_loss(query, key, indexer, selection), loss, "float32")


def test_dtype_ties_and_rows():
    query, key, value, indexer = draw(jnp.bfloat16)
    indexer.weight[1, 4] = 0  # all keys tie: the first ones are listed
    attend = jax.jit(DSA(top_k=3))
    output = attend(query, key, value, indexer)
    assert output.dtype == jnp.bfloat16
    lists = lists_by_loops(indexer, is_causal=True, top_k=3)
    assert lists[1][4].tolist() == [0, 1, 2]
    assert_close(output, oracle.attention(query, key, value, mask_of(lists, 19)), "bfloat16")
    for array in (query, key, value, *indexer):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value, indexer)[1], output[1])


def test_packed_and_padded_rows_equal_each_sequence_alone(strict_ranks):
    """Both sequences are as long, so that they are the rows of one batch; the ids of the second are torn apart."""
    ids, lengths = np.array([[1] * 13 + [0] * 6, np.random.default_rng(1).permutation([1] * 6 + [0] * 13)]), [13, 19]
    query, key, value, indexer = draw()
    attention = DSA(top_k=TOP_K)
    output = np.asarray(
        jax.jit(functools.partial(attention, segment_ids=ids, seq_lengths=lengths))(query, key, value, indexer)
    )
    places = np.stack([np.flatnonzero(ids[0] == 1), np.flatnonzero(ids[1] == 0)])
    query, key, value, *indexer = (array[[[0], [1]], places] for array in (query, key, value, *indexer))
    mask = mask_of(lists_by_loops(Indexer(*indexer), is_causal=True), 13)
    assert_close(output[[[0], [1]], places], oracle.attention(query, key, value, mask), "float32")
    assert not output[0, 13:].any()


def loss_by_definition(query, key, lists, scale, *indexer):
    """Divergence of every query, float64 [batch, queries]."""
    scores, losses = scores_by_loops(indexer), np.zeros(query.shape[:2])
    for b, t in np.ndindex(losses.shape):
        listed = lists[b][t]
        if not len(listed):
            continue
        target = np.zeros(len(listed))
        for h in range(query.shape[2]):
            weights = np.exp(scale * key[b, listed, h // 2].astype(np.float64) @ query[b, t, h])
            target += weights / weights.sum() / query.shape[2]
        predicted = np.exp(scores[b, t, listed])
        losses[b, t] = (target * np.log(target * predicted.sum() / predicted)).sum()
    return losses


@pytest.mark.parametrize("top_k", [TOP_K, 13])
def test_loss_and_its_gradients_equal_the_definition(top_k, strict_ranks):
    query, key, _, indexer = draw(queries=15, keys=13)  # two queries see nothing
    weight = np.random.default_rng(1).standard_normal((2, 15))
    attention = DSA(top_k=top_k, scale=0.6)

    @jax.jit
    def run(query, key, indexer):
        def total(query, key, indexer):
            losses = attention.indexer_loss(query, key, indexer, attention.select(indexer))
            return (losses * weight).sum(), losses

        return jax.grad(total, (0, 1, 2), has_aux=True)(query, key, indexer)

    (d_query, d_key, gradients), losses = run(query, key, indexer)
    assert not d_query.any()
    assert not d_key.any()
    lists = lists_by_loops(indexer, is_causal=True, top_k=top_k)
    definition = functools.partial(loss_by_definition, query, key, lists, 0.6)
    exact = [array.astype(np.float64) for array in indexer]
    assert_close(losses, definition(*exact), "float32")
    for i, gradient in enumerate(gradients):  # along a random direction of each array
        direction = [np.zeros_like(array) for array in exact]
        direction[i] = np.random.default_rng(i).standard_normal(exact[i].shape)
        expected = oracle.slope(lambda *x: (definition(*x) * weight).sum(), exact, direction)
        assert_close((np.asarray(gradient) * direction[i]).sum(), expected, "float32")


def test_the_choice_gives_the_indexer_no_gradient():
    query, key, value, indexer = draw()
    gradient = jax.jit(jax.grad(lambda x: DSA(top_k=TOP_K)(query, key, value, x).sum()))(indexer)
    assert not any(array.any() for array in gradient)


def test_bad_arguments_are_named():
    query, key, value, indexer = draw()
    with pytest.raises(ValueError, match="top_k"):
        DSA(top_k=0)
    with pytest.raises(ValueError, match="value must be"):
        DSA()(query, key, value[:, 1:], indexer)
    for bad in (
        indexer._replace(weight=indexer.weight[..., 1:]),
        indexer._replace(key=indexer.key[:1]),
        indexer._replace(key=indexer.key[:, 1:]),
        Indexer(indexer.query[:, 1:], indexer.key, indexer.weight[:, 1:]),
    ):
        with pytest.raises(ValueError, match="indexer must"):
            DSA()(query, key, value, bad)
