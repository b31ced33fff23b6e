"""BlockRank against loops in float64; its loss and the gradients of the loss against a dense float64 definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.block_rank import BlockRank, auxiliary_loss
from tests import oracle
from tests.cases import assert_close

BLOCK, BLOCKS = 6, 5  # instruction, three documents, query
RANK = BlockRank(block_size=BLOCK)


def draw(dtype=np.float32, seed=0):
    """query, key, value, and the left-padded blocks' real tokens; the first row's second document is empty."""
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, BLOCK * BLOCKS, 4, 8)).astype(dtype)
    key, value = random.standard_normal((2, 2, BLOCK * BLOCKS, 2, 8)).astype(dtype)
    lengths = np.array([[4, 6, 0, 1, 5], [6, 2, 3, 6, 4]])
    valid = (np.arange(BLOCK) >= BLOCK - lengths[..., None]).reshape(2, -1)
    return query, key, value, valid


def expected_mask(valid):
    """bool [batch, heads, tokens, tokens] by the rules, pair by pair."""
    rows, tokens = valid.shape
    mask = np.zeros((rows, 4, tokens, tokens), bool)
    for row, t, s in np.ndindex(rows, tokens, tokens):
        reads = s // BLOCK in (0, t // BLOCK) or t // BLOCK == tokens // BLOCK - 1
        mask[row, :, t, s] = reads and s <= t and valid[row, t] and valid[row, s]
    return mask


def labels():
    """The first row's answer starts two tokens before the end, the second row's three."""
    array = np.full((2, BLOCK * BLOCKS), -100, np.int32)
    array[0, -2:], array[1, -3:] = 7, 0
    return array


def test_attention_equals_loops_with_gradients(strict_ranks):
    query, key, value, valid = draw()
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)

    @jax.jit
    def attend(query, key, value):
        attention = BlockRank(block_size=BLOCK, scale=0.7)
        output, pullback = jax.vjp(lambda *arrays: attention(*arrays, valid), query, key, value)
        return output, *pullback(d_output)

    expected, gradients = oracle.attention(query, key, value, expected_mask(valid), scale=0.7, d_output=d_output)
    for actual, wanted in zip(attend(query, key, value), (expected, *gradients), strict=True):
        assert_close(actual, wanted, "float32")


def test_dtype_padding_and_rows():
    query, key, value, valid = draw(jnp.bfloat16)
    attend = jax.jit(RANK)
    output = attend(query, key, value, valid)
    assert output.dtype == jnp.bfloat16
    assert_close(output, oracle.attention(query, key, value, expected_mask(valid)), "bfloat16")
    for array in (query, key, value):
        array[~valid] = np.nan
        array[0, :BLOCK] = 7
    np.testing.assert_array_equal(attend(query, key, value, valid)[1], output[1])


def test_packed_prompts_equal_each_prompt_alone():
    query, key, value, valid = draw()
    ids, lengths = np.repeat([[2, 1], [5, 5]], [2 * BLOCK, 3 * BLOCK], axis=1), np.array([5 * BLOCK, 4 * BLOCK])
    arrays = [np.array(array) for array in (query, key, value)]
    for array in arrays:
        array[1, 4 * BLOCK :] = np.nan
    output = jax.jit(lambda *x: RANK(*x, segment_ids=ids, seq_lengths=lengths))(*arrays, valid)
    for row, sequence in ((0, slice(0, 12)), (0, slice(12, 30)), (1, slice(0, 24))):
        *alone, is_real = (array[row : row + 1, sequence] for array in (query, key, value, valid))
        alone = oracle.attention(*alone, expected_mask(is_real))
        assert_close(output[row : row + 1, sequence], alone, "float32")
    np.testing.assert_array_equal(output[1, 4 * BLOCK :], 0)
    with pytest.raises(ValueError, match="block_size must divide the 5 tokens"):
        RANK(query, key, value, valid, seq_lengths=np.array([5, 5]))


def definition(query, key, mask, labels, positives, *, num_last=4, temperature=0.05):
    """Logits of documents and loss, densely, row by row."""
    documents, losses = [], []
    for row, chosen in enumerate(positives):
        mass = 0
        first = next(t for t in range(labels.shape[1] - num_last, labels.shape[1]) if labels[row, t] != -100)
        for head in range(4):
            for t in (first - 1, first):
                seen = [s for s in range(BLOCK, BLOCK * (BLOCKS - 1)) if mask[row, head, t, s]]
                weight = np.exp(8**-0.5 * key[row, np.array(seen), head // 2] @ query[row, t, head])
                in_document = np.array([[s // BLOCK == 1 + n for s in seen] for n in range(BLOCKS - 2)])
                mass += in_document @ weight / weight.sum() / 8
        documents.append(mass / temperature)
        exponential = np.exp(documents[-1])
        losses += [np.log(exponential.sum() / sum(exponential[n] for n in chosen))] if chosen else []
    return np.stack(documents), sum(losses) / len(losses)


@functools.partial(jax.jit, static_argnums=4)
def compute(query, key, valid, positives, num_last=4):
    rank = BlockRank(block_size=BLOCK, num_last_queries=num_last)
    documents = rank.document_logits(rank.last_query_logits(query, key, valid), labels())
    return documents, auxiliary_loss(documents, positives)


value_and_gradients = jax.jit(jax.value_and_grad(lambda *x: compute(*x)[::-1], (0, 1), has_aux=True))


@pytest.mark.parametrize("positives", [[[0, 2], [1]], [[2], []]])
def test_documents_loss_and_its_gradients(positives, strict_ranks):
    query, key, _, valid = draw()
    mask = expected_mask(valid)
    padded = np.array([row + [-1] * (3 - len(row)) for row in positives], np.int32)
    exact = [query.astype(np.float64), key.astype(np.float64)]
    (loss, documents), gradients = value_and_gradients(query, key, valid, padded)
    expected = definition(*exact, mask, labels(), positives)
    assert_close(documents, expected[0], "float32")
    assert_close(loss, expected[1], "float32")
    for i, gradient in enumerate(gradients):  # along a random direction of each array
        direction = [np.zeros_like(array) for array in exact]
        direction[i] = np.random.default_rng(i).standard_normal(exact[i].shape)
        slope = oracle.slope(lambda *x: definition(*x, mask, labels(), positives)[1], exact, direction)
        assert_close((np.asarray(gradient) * direction[i]).sum(), slope, "float32")


def test_logits_are_those_of_the_last_queries():
    query, key, _, valid = draw()
    rank = BlockRank(block_size=BLOCK, num_last_queries=99, scale=0.5)
    logits = jax.jit(rank.last_query_logits)(query, key, valid)
    expected = 0.5 * np.einsum("bthd,bshd->bhts", query[:, -BLOCK:], key.repeat(2, 2), dtype=np.float64)
    seen = expected_mask(valid)[:, :, -BLOCK:]
    np.testing.assert_array_equal(np.isneginf(logits), ~seen)
    assert_close(np.where(seen, logits, 0), np.where(seen, expected, 0), "float32")


def test_missing_signal_tokens_are_nan_and_numbers_of_no_document_are_padding():
    query, key, _, valid = draw()
    documents, _ = compute(query, key, valid, np.array([[0], [1]], np.int32), num_last=3)
    assert not np.isnan(documents[0]).any()
    assert np.isnan(documents[1]).all()  # the label stands first among three, without the token before
    loss = jax.jit(auxiliary_loss)
    first, second = (loss(documents[:1], np.array([x], np.int32)) for x in ([1, 3, -1], [1, 1, 1]))
    assert first == second > 0


def test_bad_arguments_are_named():
    query, key, value, valid = draw()
    for name, call in {
        "block_size": lambda: BlockRank(block_size=7)(query, key, value, valid),
        "is_valid": lambda: RANK(query, key, value, valid[:, 1:]),
        "key must have": lambda: RANK(query, key[:, 6:], value[:, 6:], valid),
        "num_last_queries": lambda: BlockRank(num_last_queries=0),
        "labels": lambda: RANK.document_logits(np.zeros((2, 4, 3, 30)), labels()[:, 1:]),
        "3 blocks": lambda: BlockRank(block_size=15).document_logits(np.zeros((2, 4, 3, 30)), labels()),
        "temperature": lambda: BlockRank(temperature=0),
        "positives": lambda: auxiliary_loss(np.zeros((2, 3)), np.zeros((2, 1))),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
