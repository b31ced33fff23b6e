"""AdaSpa against dense softmax and loops over blocks in float64: masses, tiers of heads, text, reuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.adaspa import AdaSpa
from tests import near_ties, oracle
from tests.cases import assert_close

SIZE, TOKENS, HEADS = 4, 38, 6  # ten blocks, the last of two tokens
SCALE = 0.5


def draw(sharpness, dtype=np.float32, seed=0):
    """Queries of head h are multiplied by sharpness[row][h]: sharp heads have recall near 1."""
    random = np.random.default_rng(seed)
    query = random.standard_normal((2, TOKENS, HEADS, 8)) * np.asarray(sharpness, np.float64)[:, None, :, None]
    key, value = random.standard_normal((2, 2, TOKENS, 3, 8))
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


MIXED = [[10, 0.2, 1, 0.5, 8, 0.7], [0.1, 0.2, 10, 0.3, 0.4, 0.5]]
SHARP = [[6, 7, 8, 9, 10, 11]] * 2
FLAT = [[0.2, 0.1, 0.3, 0.4, 0.2, 0.1]] * 2


def logits_of(query, key):
    key = key.astype(np.float64).repeat(2, 2)
    return SCALE * np.einsum("bthd,bshd->bhts", query.astype(np.float64), key)


def log_sum_exp_of(query, key):
    return np.log(np.exp(logits_of(query, key)).sum(-1)).swapaxes(1, 2)


def choose(query, key, log_sum_exp, count, text_length=0):
    """The map by loops.

    Returns:
      chosen: bool [batch, heads, blocks, blocks].
      adapted: how many heads of each row are sharper (or flatter).
      decided: bool [batch, heads, blocks], the rows that no rounding changes.
    """
    logits, log_sum_exp = logits_of(query, key), log_sum_exp.swapaxes(1, 2)[..., None]
    weight = np.exp(logits - log_sum_exp)
    # Of a logit, a product of 8 and its scale; of the log-sum-exp, logits, a sum of exp, its log and the maximum.
    error = 9 * near_ties.UNIT * logits_of(np.abs(query), np.abs(key))
    of_sum = error.max(-1, keepdims=True) + near_ties.UNIT * (TOKENS + 2 * near_ties.EXP + 2 * np.abs(log_sum_exp))
    relative = error + of_sum + near_ties.UNIT * (np.abs(logits - log_sum_exp) + near_ties.EXP + SIZE * SIZE)
    errors = weight * relative + near_ties.TINY
    chosen, adapted, blocks = np.zeros((2, HEADS, 10, 10), bool), [], range(10)
    decided = np.ones((2, HEADS, 10), bool)
    has_text = [any(t >= TOKENS - text_length for t in range(SIZE * j, min(SIZE * j + SIZE, TOKENS))) for j in blocks]
    for b in range(2):
        mass, error = np.zeros((2, HEADS, 10, 10))
        for h, i, j in np.ndindex(mass.shape):
            pair = b, h, slice(SIZE * i, SIZE * i + SIZE), slice(SIZE * j, SIZE * j + SIZE)
            mass[h, i, j], error[h, i, j] = weight[pair].sum(), errors[pair].sum()

        def keep(h, count, mass=mass):
            kept = np.zeros((10, 10), bool)
            for i in blocks:
                ranking = sorted((j for j in blocks if not has_text[j]), key=lambda j: -mass[h, i, j])
                kept[i, ranking[:count]] = True
                kept[i, [j for j in blocks if has_text[i] or has_text[j]]] = True
            return kept

        recall = np.array([mass[h][keep(h, count)].sum() / mass[h].sum() for h in range(HEADS)])
        ranking, n = np.argsort(-recall), min(sum(r > 0.8 for r in recall), HEADS // 2)
        adapted.append(n)
        # Both sums err by the masses' errors, of which a near tie may change two in each row, and by their roundings.
        of_recall = 3 * error.sum((1, 2)) / mass.sum((1, 2)) + 2 * 100 * near_ties.UNIT
        assert (np.abs(recall - 0.8) > of_recall).all()
        for sharper in (n, HEADS - n):
            is_sharper = np.isin(np.arange(HEADS), ranking[:sharper])
            assert all(has_text) or near_ties.is_decided(recall, of_recall, is_sharper)  # text keeps all anyway
        for place, h in enumerate(ranking):
            fewer = max(1, count // 2)
            chosen[b, h] = keep(h, fewer if place < n else 2 * count - fewer if place >= HEADS - n else count)
            video = ~np.array(has_text)
            decided[b, h] = ~video | near_ties.is_decided(mass[h][:, video], error[h][:, video], chosen[b, h][:, video])
    return chosen, adapted, near_ties.most(decided)


def tokens_of(chosen):
    """bool [batch, heads, tokens, tokens]."""
    return chosen.repeat(SIZE, 2).repeat(SIZE, 3)[:, :, :TOKENS, :TOKENS]


def queries_of(decided):
    """Rows of blocks as queries, bool [batch, tokens, heads]."""
    return decided.repeat(SIZE, 2)[:, :, :TOKENS].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("sparsity", "text_length"))
def run(query, key, value, sparsity=0.7, text_length=0):
    """A step that searches, and its output."""
    adaspa = AdaSpa(sparsity=sparsity, text_length=text_length, block_size=SIZE, scale=SCALE)
    state = adaspa.search(query, key)
    return state, adaspa(query, key, value, state)


@pytest.mark.parametrize(
    ("sharpness", "options", "count", "adapted"),
    [
        (MIXED, {}, 3, [2, 1]),
        (SHARP, {}, 3, [3, 3]),
        (FLAT, {}, 3, [0, 0]),
        (MIXED, {"text_length": 3, "sparsity": 0.6}, 3, [2, 1]),
        (MIXED, {"text_length": 30}, 1, [3, 3]),
        (FLAT, {"text_length": TOKENS + 1}, 1, [3, 3]),
    ],
    ids=["mixed", "sharp", "flat", "text", "mostly_text", "only_text"],
)
def test_search_and_output_equal_loops(sharpness, options, count, adapted, strict_ranks):
    query, key, value = draw(sharpness)
    (levels, log_sum_exp), output = run(query, key, value, **options)
    assert_close(log_sum_exp, log_sum_exp_of(query, key), "float32")
    text_length = options.get("text_length", 0)
    expected, num_adapted, decided = choose(query, key, log_sum_exp_of(query, key), count, text_length)
    assert num_adapted == adapted
    np.testing.assert_array_equal(levels.to_mask()[decided], expected[decided])
    if not options:  # tiers cancel
        assert np.asarray(levels.to_mask()).mean() == pytest.approx(count / 10)
    attended = oracle.attention(query, key, value, tokens_of(expected), scale=SCALE)
    assert_close(output, attended, "float32", queries_of(decided))


def test_later_steps_reuse_the_choice_and_the_log_sum_exp():
    query, key, value = draw(MIXED)
    state, _ = run(query, key, value)
    later = [array + 0.3 * other for array, other in zip((query, key, value), draw(MIXED, seed=1), strict=True)]
    adaspa = AdaSpa(sparsity=0.7, block_size=SIZE, scale=SCALE)
    output = jax.jit(adaspa)(*later, state)
    mask = tokens_of(np.asarray(state.levels.to_mask()))
    assert_close(output, oracle.attention(*later, mask, scale=SCALE), "float32")

    cached, _, decided = choose(*later[:2], log_sum_exp_of(query, key), 3)
    chosen = jax.jit(adaspa.select)(*later[:2], state.log_sum_exp).to_mask()
    np.testing.assert_array_equal(chosen[decided], cached[decided])
    fresh, *_ = choose(*later[:2], log_sum_exp_of(*later[:2]), 3)
    assert (cached != fresh)[decided].any()


def test_dtype_rows_and_attention_that_searches_itself():
    query, key, value = draw(MIXED, jnp.bfloat16)
    attend = jax.jit(AdaSpa(sparsity=0.7, block_size=SIZE, scale=SCALE))
    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    chosen, _, decided = choose(query, key, log_sum_exp_of(query, key), 3)
    attended = oracle.attention(query, key, value, tokens_of(chosen), scale=SCALE)
    assert_close(output, attended, "bfloat16", queries_of(decided))
    for array in (query, key, value):
        array[0] = np.nan
    np.testing.assert_array_equal(attend(query, key, value)[1], output[1])


def test_bad_arguments_are_named():
    query, key, value = draw(MIXED)
    for options, name in (
        ({"sparsity": 0.2}, "sparsity must be"),
        ({"sparsity": 1.1}, "sparsity must be"),
        ({"text_length": -1}, "text_length"),
        ({"block_size": 0}, "block_size"),
    ):
        with pytest.raises(ValueError, match=name):
            AdaSpa(**options)
    adaspa = AdaSpa()
    with pytest.raises(ValueError, match="log_sum_exp must have"):
        adaspa.search(query, key, np.zeros((2, TOKENS, 3), np.float32))
    with pytest.raises(ValueError, match="as many tokens"):
        adaspa.search(query[:, 1:], key)
    with pytest.raises(ValueError, match="state must be None"):
        adaspa(query, key, value, jax.eval_shape(adaspa.search, query, key), seq_lengths=[5, 6])
