"""PSA against loops in float64: samples, bands, caps, the pyramid, its gradients, and the published errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.psa import PSA
from tests import near_ties, oracle
from tests.cases import assert_close
from tests.systems.check_psa import Published

SIZES = {"query_block_size": 16, "key_block_size": 64}
BOUNDS = (0.3, 0.5, 0.75, 0.9)


def draw(tokens=563, heads=4, kv_heads=2, dtype=np.float32, seed=0):
    """Keys of some blocks are more alike than those of others, so that thresholds of similarity part them.

    Logits are exact, and so are their differences: the scale is 1/4. Scores are exp of them, and tie where they tie.
    """
    random = np.random.default_rng(seed)
    query, key, value = random.standard_normal((3, 2, tokens, heads, 16))
    centre, share = random.standard_normal((2, tokens, heads, 16)), random.uniform(0, 1, (2, tokens, heads, 1))
    start = np.arange(tokens) // 64 * 64
    key = share[:, start] * centre[:, start] + (1 - share[:, start]) * key
    arrays = query, key[:, :, :kv_heads], value[:, :, :kv_heads]
    query, key, value = (near_ties.eighths(array).astype(dtype) for array in arrays)
    return query, key, value, PSA(**SIZES).draw_offsets(jax.random.key(seed), query, key)


def expect_scores(query, key, offsets, scale):
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, tokens, heads, _ = query.shape
    query_blocks, key_blocks = -(-tokens // 16), -(-tokens // 64)
    scores = np.zeros((batch, heads, query_blocks, key_blocks))
    for b, h, i in np.ndindex(batch, heads, query_blocks):
        g = h * key.shape[2] // heads
        rows = [min(16 * i + n, tokens - 1) for n in np.asarray(offsets[0])[b, h]]
        places = [[min(64 * j + n, tokens - 1) for n in np.asarray(offsets[1])[b, g]] for j in range(key_blocks)]
        best = np.array([[(scale * key[b, block, g] @ query[b, t, h]).max() for block in places] for t in rows])
        scores[b, h, i] = np.exp(best - best.max(1, keepdims=True)).max(0)
    return scores


def expect_level_ends(sorted_scores, rule, bounds):
    """Ends of levels 1, 2, 4, 8 in one ranking, and whether no rounding of the shares changes them.

    1, 1, 2, 4 blocks of 64 keys fill a tile of 32.
    """
    size, ends, last, decided = len(sorted_scores), [], 0, True
    error = 2 * (size + 2 + near_ties.EXP) * near_ties.UNIT  # two sums of quotients of exp
    share = np.cumsum(sorted_scores) / sorted_scores.sum()
    for level, bound in zip((1, 2, 4, 8), bounds, strict=True):
        if rule == "rank":
            end = int(size * bound)
        else:
            within = sum(part <= bound + 1e-6 for part in share)
            decided &= (np.abs(share - bound - 1e-6) > error).all()
            end = within + 1 if within else last
            if level == 1:
                end = max(end, int(0.06 * size) + 1)
        end = min(end, size)
        multiple = max(1, level // 2)
        while end > last and (end - last) % multiple:
            end += 1
        if end >= size:
            end = size
            while (end - last) % multiple:
                end -= 1
        last = max(end, last)
        ends.append(last)
    return ends, decided


def expect_levels(query, key, offsets, rule, bounds, scale=16**-0.5):
    """Levels, and bool [batch, heads, query_blocks], the rows that no rounding changes."""
    scores = expect_scores(query, key, offsets, scale)
    levels, decided = np.zeros(scores.shape, int), np.zeros(scores.shape[:3], bool)
    for b, h, i in np.ndindex(decided.shape):
        ranking = np.argsort(-scores[b, h, i], kind="stable")
        ends, decided[b, h, i] = expect_level_ends(scores[b, h, i][ranking], rule, bounds)
        for place, block in enumerate(ranking):
            reached = [level for level, end in zip((1, 2, 4, 8), ends, strict=True) if place < end]
            levels[b, h, i, block] = reached[0] if reached else 0
    return levels, near_ties.most(decided)


def expect_cap(key, thresholds):
    """Of every key block, by the mean cosine of the keys 1, 3 and 7 apart that it has."""
    key = np.asarray(key, np.float64)
    cap = np.ones((key.shape[0], key.shape[2], -(-key.shape[1] // 64)), int)
    for (b, g, j), (level, threshold) in itertools.product(
        np.ndindex(cap.shape), zip((2, 4, 8), thresholds, strict=True)
    ):
        block = key[b, 64 * j : 64 * j + 64, g]
        block = block / np.linalg.norm(block, axis=-1, keepdims=True)
        cosines = [block[n] @ block[n + level - 1] for n in range(0, len(block) - level + 1, level)]
        # Rounded are two norms of 16, the product of 16, and the mean of up to 32, all at most 1.
        assert not cosines or abs(np.mean(cosines) - threshold) > (2 * 10 + 16 + 32) * near_ties.UNIT
        if cosines and np.mean(cosines) > threshold:
            cap[b, g, j] = level
    return cap


def expect_attention(query, key, value, levels, d_output=None, filled_to=None):
    """Dense softmax over all keys and means, each seen where its block has its level: output, or it and gradients.

    The logarithm of a mean's count rides on one more feature. Keys are means of copies of the last up to filled_to.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scale, tokens = query.shape[3] ** -0.5, key.shape[1]
    means, counts, rows = [], [], []  # of the pyramid: weights of the keys, their number; who sees it
    for level in (1, 2, 4, 8):
        for start in range(0, tokens if level == 1 else filled_to or tokens, level):
            run = [min(n, tokens - 1) for n in range(start, min(start + level, filled_to or tokens))]
            means.append(np.bincount(run, minlength=tokens) / len(run))
            counts.append(len(run))
            rows.append((levels[:, :, :, start // 64] == level).repeat(16, 2)[:, :, :tokens])
    means, mask = np.array(means), np.stack(rows, axis=-1)

    def pool(array):
        return np.einsum("ns,bskd->bnkd", means, array)

    ones = np.ones((*query.shape[:3], 1))
    log_counts = np.broadcast_to(np.log(counts)[None, :, None, None] / scale, (*pool(key).shape[:3], 1))
    result = oracle.attention(
        np.concatenate([query, ones], -1),
        np.concatenate([pool(key), log_counts], -1),
        pool(value),
        mask,
        scale=scale,
        d_output=d_output,
    )
    if d_output is None:
        return result
    output, (d_query, d_key, d_value) = result
    back = functools.partial(np.einsum, "ns,bnkd->bskd", means)
    return output, d_query[..., :-1], back(d_key[..., :-1]), back(d_value)


def compiled(psa):
    """Levels and output."""
    return jax.jit(
        lambda query, key, value, offsets: (psa.select(query, key, offsets).levels, psa(query, key, value, offsets))
    )


@pytest.mark.parametrize("bounds", [(0.12, 0.3, 0.5, 0.6), (0.3, 0.5, 0.5, 0.95)])
def test_levels_by_rank_equal_loops(bounds, strict_ranks):
    """Bands of 8 keys to a mean are rounded up to whole tiles, or down at the end of the row."""
    query, key, _, offsets = draw()
    expected, _ = expect_levels(query, key, offsets, "rank", bounds)
    levels = jax.jit(PSA(**SIZES, bounds=bounds).select)(query, key, offsets)
    np.testing.assert_array_equal(levels.levels, expected)


def test_attention_and_gradients_equal_float64(strict_ranks):
    query, key, value, offsets = draw()
    expected, decided = expect_levels(query, key, offsets, "energy", BOUNDS)
    rows = decided.repeat(16, 2)[:, :, :563].swapaxes(1, 2)  # [batch, tokens, heads]
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)
    d_output = np.where(rows[..., None], d_output, 0)
    thresholds = (0.2, 0.45, 0.7)
    psa = PSA(**SIZES, rule="energy", bounds=BOUNDS, similarity_thresholds=thresholds, text_length=70)

    @jax.jit
    def call(query, key, value, d_output):
        levels = psa.select(query, key, offsets)
        output, pullback = jax.vjp(lambda *x: psa(*x, offsets), query, key, value)
        return levels.levels, output, *pullback(d_output)

    levels, *results = call(query, key, value, d_output)
    assert set(np.unique(expected)) == {0, 1, 2, 4, 8}
    expected[..., -2:] = 1  # 70 of 563 tokens reach into the last but one of nine blocks
    cap = expect_cap(key, thresholds)
    assert set(np.unique(cap)) == {1, 2, 4, 8}
    expected = np.minimum(expected, cap.repeat(2, 1)[:, :, None])
    np.testing.assert_array_equal(levels[decided], expected[decided])
    output, *gradients = expect_attention(query, key, value, expected, d_output)
    assert_close(results[0], output, "float32", rows)
    for actual, wanted in zip(results[1:], gradients, strict=True):
        assert_close(actual, wanted, "float32")


def test_published_copies_of_the_last_token_count():
    query, key, value, offsets = draw(tokens=200, heads=2)
    levels, output = compiled(Published(**SIZES, bounds=(0.25, 0.45, 1.0, 1.0)))(query, key, value, offsets)
    assert (np.asarray(levels)[..., -1] > 1).any()
    expected = expect_attention(query, key, value, np.asarray(levels), filled_to=256)
    assert_close(output, expected, "float32")


def test_dtype_and_rows():
    query, key, value, offsets = draw(tokens=200, dtype=jnp.bfloat16)
    attend = compiled(PSA(**SIZES, bounds=(0.25, 0.5, 0.75, 0.75)))
    levels, output = attend(query, key, value, offsets)
    assert output.dtype == jnp.bfloat16
    expected = expect_attention(query, key, value, np.asarray(levels))
    assert_close(output, expected, "bfloat16")
    for array in (query, key, value):
        array[0] = np.nan
    for beside_nan, alone in zip(attend(query, key, value, offsets), (levels, output), strict=True):
        np.testing.assert_array_equal(beside_nan[1], alone[1])


def test_places_are_drawn_once_each():
    query, key, _, offsets = draw()
    assert [places.shape for places in offsets] == [(2, 4, 4), (2, 2, 16)]
    for places, size in zip(offsets, (16, 64), strict=True):
        ordered = np.sort(places)
        assert (np.diff(ordered) > 0).all()
        assert ordered.min() >= 0
        assert ordered.max() < size
    other = PSA(**SIZES).draw_offsets(jax.random.key(1), query, key)
    assert (np.asarray(other[1]) != np.asarray(offsets[1])).any()


def test_packed_and_padded_rows_equal_each_sequence_alone():
    query, key, value, _ = draw(tokens=64)
    psa = PSA(query_block_size=8, key_block_size=32, bounds=(0.5, 0.5, 1.0, 1.0))
    offsets = psa.draw_offsets(jax.random.key(0), query, key)
    segment_ids = np.array([[0] * 64, [3, 1] * 32])
    packed = functools.partial(psa, segment_ids=segment_ids, seq_lengths=[32, 64])
    output, attend = jax.jit(packed)(query, key, value, offsets), jax.jit(psa)
    for row, places in ((0, slice(0, 32)), (1, slice(0, None, 2)), (1, slice(1, None, 2))):
        arrays = [array[row : row + 1, places] for array in (query, key, value)]
        alone = attend(*arrays, tuple(side[row : row + 1] for side in offsets))
        assert_close(output[row, places], alone[0], "float32")
    np.testing.assert_array_equal(output[0, 32:], 0)


def test_bad_arguments_are_named():
    query, key, value, offsets = draw()
    for options, message in (
        ({"bounds": (0.5, 0.4, 0.6, 0.7)}, "bounds must be"),
        ({"rule": "best"}, "rule must be"),
        ({"query_block_size": 3}, "query_block_size must be"),
        ({"key_block_size": 36}, "key_block_size must be"),
        ({"tile_size": 128}, "tile_size"),
        ({"text_length": -1}, "text_length must be"),
    ):
        with pytest.raises(ValueError, match=message):
            PSA(**{**SIZES, **options})
    with pytest.raises(ValueError, match="offsets must be"):
        PSA(query_block_size=16, key_block_size=128)(query, key, value, offsets)
