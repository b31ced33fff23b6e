"""InfLLM-v2 against loops in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.infllm_v2 import InfLLMv2
from tests import near_ties, oracle
from tests.cases import assert_close

TOKENS = 75
OPTIONS = {
    "block_size": 8,
    "pool_size": 4,
    "pool_stride": 2,
    "initial_blocks": 1,
    "local_blocks": 1,
    "top_k": 5,
    "dense_length": TOKENS,
}
OTHERS = (
    {"pool_size": 8, "initial_blocks": 0, "local_blocks": 0, "top_k": 2},
    {"pool_stride": 4, "initial_blocks": 2, "local_blocks": 0, "top_k": 4},
    {"pool_size": 2, "top_k": 20},
)


def draw(dtype=np.float32, seed=0):
    """Two rows, two key/value heads of two query heads each; nine blocks and a half."""
    random = np.random.default_rng(seed)
    query, d_output = random.standard_normal((2, 2, TOKENS, 4, 8)).astype(dtype)
    return query, *random.standard_normal((2, 2, TOKENS, 2, 8)).astype(dtype), d_output


@jax.jit
def differentiate(query, key, value, d_output, **sequences):
    """Output and the gradients of query, key and value."""
    attend = functools.partial(InfLLMv2(**OPTIONS, scale=0.7), **sequences)
    output, pull_back = jax.vjp(attend, query, key, value)
    return output, *pull_back(d_output)


def token_mask(query, key, block_size, pool_size, pool_stride, initial_blocks, local_blocks, top_k, scale=8**-0.5, **_):
    """What every query head attends, bool [batch, heads, tokens, tokens]; and where no rounding changes it."""
    batch, tokens, heads, _ = query.shape
    query, key, group = query.astype(np.float64), key.astype(np.float64), heads // key.shape[2]
    mask, decided = np.zeros((batch, heads, tokens, tokens), bool), np.zeros((batch, heads, tokens), bool)
    starts = range(0, tokens - pool_size + 1, pool_stride)
    for b, kv_head in np.ndindex(batch, key.shape[2]):
        heads_of_group = range(kv_head * group, (kv_head + 1) * group)
        pools = np.array([key[b, start : start + pool_size, kv_head] for start in starts])
        means, sizes = pools.mean(1), np.abs(pools).mean(1)
        for t in range(tokens):
            ended = [start for start in starts if start + pool_size - 1 <= t]
            weights, errors = np.zeros((2, len(ended)))
            for h in heads_of_group if ended else ():
                q, mean = query[b, t, h], means[: len(ended)]
                # Rounded are the mean of a pool, the product of 8, its scale, and below the sum of two heads.
                error = near_ties.dot_error(q, mean, scale * sizes[: len(ended)] @ np.abs(q), pool_size + 1 + 8 + 1)
                weight, error = near_ties.softmax(scale * mean @ q, error)
                weights, errors = weights + weight, errors + error + near_ties.UNIT * weight
            own = t // block_size
            forced = {j for j in range(own + 1) if j < initial_blocks or j >= own - local_blocks}
            others, start = sorted(set(range(own)) - forced), np.array(ended)
            overlaps = {j: (start < (j + 1) * block_size) & (start + pool_size > j * block_size) for j in others}
            ranking = sorted(others, key=lambda j, w=weights, o=overlaps: (-w[o[j]].max(), j))
            best, rest = ranking[: top_k - len(forced)], ranking[top_k - len(forced) :]
            # A mean that both overlap weighs the same in both: of such a tie the lower block is kept.
            decided[b, heads_of_group, t] = all(
                (weights - errors)[overlaps[j]].max()
                >= (weights + errors)[overlaps[n] & ~overlaps[j] if j < n else overlaps[n]].max(initial=0)
                for j, n in itertools.product(best, rest)
            )
            for s in range(t + 1):
                mask[b, heads_of_group, t, s] = s // block_size in forced | set(best)
    return mask, near_ties.most(decided)


@pytest.mark.parametrize("change", [{}, *OTHERS], ids=str)
def test_choice_equals_loops(change, strict_ranks):
    query, key, *_ = draw()
    options = {**OPTIONS, **change}
    selection = jax.jit(InfLLMv2(**options).select)(query, key)
    chosen = np.asarray(selection.to_mask()).repeat(8, axis=-1)[..., :TOKENS] & np.tril(np.ones((TOKENS, TOKENS), bool))
    expected, decided = token_mask(query, key, **options)
    np.testing.assert_array_equal(chosen[decided], expected[decided])


def test_output_and_gradients_equal_a_dense_softmax(strict_ranks):
    query, key, value, d_output = draw()
    mask, decided = token_mask(query, key, **OPTIONS, scale=0.7)
    decided = decided.swapaxes(1, 2)
    d_output = np.where(decided[..., None], d_output, 0)

    output, *actual = differentiate(query, key, value, d_output)
    expected, gradients = oracle.attention(query, key, value, mask, scale=0.7, d_output=d_output)
    assert_close(output, expected, "float32", decided)
    for one, other in zip(actual, gradients, strict=True):
        assert_close(one, other, "float32")


def test_dtype_and_rows():
    query, key, value, _ = draw(jnp.bfloat16)
    attend = jax.jit(InfLLMv2(**OPTIONS))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    mask, decided = token_mask(query, key, **OPTIONS)
    assert_close(output, oracle.attention(query, key, value, mask), "bfloat16", decided.swapaxes(1, 2))
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value)[1], output[1])


def test_packed_and_padded_rows_equal_each_sequence_alone(strict_ranks):
    """Two long documents with a short one each, which is dense; the ids of the second row are torn apart."""
    short, random = 30, np.random.default_rng(1)
    ids = np.array([[3] * TOKENS + [-1] * short + [-1] * 2, random.permutation([7] * 2 + [-1] * short + [3] * TOKENS)])
    lengths = np.array([TOKENS + short, TOKENS + short + 2])
    arrays = [random.standard_normal((2, ids.shape[1], heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4)]
    for array in arrays[:3]:
        array[0, lengths[0] :] = np.nan
    results = [np.asarray(array) for array in differentiate(*arrays, segment_ids=ids, seq_lengths=lengths)]
    for segment in (3, -1):
        places = np.stack([np.flatnonzero(ids[b, : lengths[b]] == segment) for b in range(2)])
        *alone, d_output = (array[[[0], [1]], places] for array in arrays)
        if segment == 3:
            expected = differentiate(*alone, d_output)
        else:
            mask = np.broadcast_to(np.tril(np.ones((short, short), bool)), (2, 4, short, short))
            output, gradients = oracle.attention(*alone, mask, scale=0.7, d_output=d_output)
            expected = output, *gradients
        for one, other in zip(results, expected, strict=True):
            assert_close(one[[[0], [1]], places], np.asarray(other), "float32")
    for array in results:
        assert not array[0, lengths[0] :].any()


def test_short_sequences_attend_everything():
    query, key, value, _ = draw()
    attend = jax.jit(InfLLMv2(**{**OPTIONS, "dense_length": TOKENS + 1}))
    mask = np.broadcast_to(np.tril(np.ones((TOKENS, TOKENS), bool)), (2, 4, TOKENS, TOKENS))
    assert_close(attend(query, key, value), oracle.attention(query, key, value, mask), "float32")


def test_rows_shorter_than_a_pool_have_the_forced_blocks_alone():
    query, key, *_ = (array[:, :5] for array in draw())
    options = {**OPTIONS, "block_size": 2, "pool_size": 6, "local_blocks": 0, "top_k": 2, "dense_length": 0}
    indices = jax.jit(InfLLMv2(**options).select)(query, key).indices
    assert indices[1, 3].tolist() == [[0, -1], [0, -1], [1, 0], [1, 0], [2, 0]]


def test_bad_arguments_are_named():
    query, key, value, _ = draw()
    for options, name in (
        ({"block_size": 0}, "block_size"),
        ({"pool_stride": 3}, "pool_stride"),
        ({"block_size": 9}, "pool_stride"),
        ({"top_k": 2}, "top_k"),
        ({"initial_blocks": -1}, "initial_blocks"),
    ):
        with pytest.raises(ValueError, match=name):
            InfLLMv2(**{**OPTIONS, **options})
    with pytest.raises(ValueError, match="key must have"):
        InfLLMv2()(query[:, 1:], key, value)
