"""Options that the authors' codes have beyond their defaults, by loops in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from sparse_attn.grammar import choose
from sparse_attn.systems.pbs_attention import PBSAttention
from sparse_attn.systems.prism import Prism
from sparse_attn.systems.psa import PSA
from sparse_attn.systems.sla import SLA
from sparse_attn.systems.xattention import XAttention
from tests import near_ties, oracle
from tests.cases import assert_close
from tests.systems import test_psa
from tests.systems.check_psa import Published
from tests.systems.test_prefill import BLOCK, draw, is_prefix_decided, order_pbs, padded_mean, softmax, top_p
from tests.systems.test_sla import SIZES
from tests.systems.test_sla import draw as draw_sla

STRIDE = 4
MEETINGS = {  # of queries and keys of a tile: how often each pair counts
    "inverse": {(3 - n, n): 1 for n in range(STRIDE)},
    "slash": {(n, n): 1 for n in range(STRIDE)},
    "double": {(3 - n, (n + more) % STRIDE): 1 for n in range(STRIDE) for more in (0, 1)},
    "triple": {(3 - n, (n + more) % STRIDE): 2 - abs(more) for n in range(STRIDE) for more in (-1, 0, 1)},
    (2, 0, 3, 1): {(2, 0): 1, (0, 1): 1, (3, 2): 1, (1, 3): 1},
}


def tokens_of(choice, num_queries, num_keys, is_causal):
    """bool [..., queries, keys] of a choice of blocks."""
    mask = choice.repeat(BLOCK, -2).repeat(BLOCK, -1)[..., :num_queries, :num_keys]
    return mask & (np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool) | (not is_causal))


def choose_xattention(query, key, threshold, mode, norm, is_causal, keep_sink, keep_recent):
    """Which key blocks each query block of one head attends, bool [query_blocks, key_blocks], and whether no rounding
    changes that, bool [query_blocks].
    """
    num_queries, num_keys = len(query), len(key)
    query, key = (np.pad(x, ((0, -len(x) % BLOCK), (0, 0))) for x in (query, key))
    diagonal = (len(key) - len(query)) // BLOCK
    side, rows, columns = BLOCK // STRIDE, -(-num_queries // STRIDE), len(key) // STRIDE
    weights, errors = np.zeros((2, len(query) // STRIDE, columns))
    for r in range(rows):
        logits = np.full(columns, -np.inf)
        for c in range(columns):
            if c * STRIDE < num_keys and (c <= r + diagonal * side or not is_causal):
                pairs = MEETINGS[mode].items()
                dots = [times * (query[r * STRIDE + i] @ key[c * STRIDE + j]) for (i, j), times in pairs]
                logits[c] = sum(dots) * 8**-0.5 / STRIDE / norm
        weights[r], errors[r] = softmax(logits, roundings=4)
    decided = np.ones(-(-num_queries // BLOCK), bool)
    chosen = np.zeros((-(-num_queries // BLOCK), len(key) // BLOCK), bool)
    for i in range(len(chosen)):
        blocks = range(i + diagonal + 1 if is_causal else chosen.shape[1])
        mass, error = (
            np.array([x[i * side : (i + 1) * side, j * side : (j + 1) * side].sum() for j in blocks])
            for x in (weights, errors)
        )
        forced = {0, i + diagonal} if is_causal else set()
        kept = set(top_p(mass, threshold, forced))
        decided[i] = threshold == 0 or is_prefix_decided(mass, error, list(kept), threshold, forced)
        kept |= {i + diagonal} if keep_recent else set()
        chosen[i, list(blocks if keep_sink and i == 0 else kept)] = True
    return chosen, decided


@pytest.mark.parametrize(
    ("mode", "is_causal", "queries", "keep_sink", "keep_recent", "norm"),
    [
        ("slash", True, 44, False, False, 1.0),
        ("double", True, 28, True, False, 1.5),
        ("triple", True, 44, False, True, 1.0),
        ("slash", False, 44, True, True, 1.0),
        ((2, 0, 3, 1), False, 28, False, True, 1.0),
    ],
)
def test_xattention_modes(mode, is_causal, queries, keep_sink, keep_recent, norm):
    query, key, value = draw()
    query = query[:, :queries]
    thresholds = (0.3, 0.5, 0.7, 0.0)
    flags = {"keep_sink": keep_sink, "keep_recent": keep_recent}
    options = {"mode": mode, "is_causal": is_causal, "norm": norm, **flags}
    heads = [
        choose_xattention(np.float64(query[b, :, h]), np.float64(key[b, :, h // 2]), thresholds[h], **options)
        for b, h in np.ndindex(2, 4)
    ]
    expected, decided = (np.stack(x).reshape(2, 4, *x[0].shape) for x in zip(*heads, strict=True))
    near_ties.most(decided)

    @jax.jit
    def run(query, key, value):
        system = XAttention(threshold=thresholds, stride=STRIDE, block_size=BLOCK, **options)
        return system.select(query, key).to_mask(), system(query, key, value)

    mask, output = run(query, key, value)
    np.testing.assert_array_equal(np.asarray(mask)[decided], expected[decided])
    seen = tokens_of(expected, queries, key.shape[1], is_causal)
    rows = decided.repeat(BLOCK, 2)[:, :, :queries].swapaxes(1, 2)
    assert_close(output, oracle.attention(query, key, value, seen), "float32", rows=rows)


def test_xattention_bad_options_are_named():
    for mode in ("random", (0, 1, 2, 2)):
        with pytest.raises(ValueError, match="mode"):
            XAttention(stride=STRIDE, block_size=BLOCK, mode=mode)


@pytest.mark.parametrize(("keep_first", "keep_diagonal"), [(False, True), (True, False), (False, False)])
def test_prism_without_forced_blocks(keep_first, keep_diagonal):
    query, key, value = draw()
    sizes = {"high_size": 4, "low_size": 6, "high_threshold": 0.3, "low_threshold": 0.4, "block_size": BLOCK}
    system = Prism(**sizes, temperatures=(0.7, 1.3), keep_first=keep_first, keep_diagonal=keep_diagonal)
    blocks = -(-query.shape[1] // BLOCK)
    expected, decided = np.zeros((2, 4, blocks, blocks), bool), np.ones((2, 4, blocks), bool)
    for b, h in np.ndindex(2, 4):
        heads = query[b, :, h].astype(np.float64), key[b, :, h // 2].astype(np.float64)
        means = [np.stack([padded_mean(x[i * BLOCK : (i + 1) * BLOCK]) for i in range(blocks)]) for x in heads]
        for features, temperature, share in (([0, 1, 4, 5], 0.7, 0.3), ([1, 2, 3, 5, 6, 7], 1.3, 0.4)):
            logits = means[0][:, features] @ means[1][:, features].T / (len(features) ** 0.5 * temperature)
            for i in range(blocks):
                weights, error = softmax(logits[i, : i + 1], roundings=4)
                kept = top_p(weights, share)
                expected[b, h, i, kept] = True
                decided[b, h, i] &= is_prefix_decided(weights, error, kept, share)
        expected[b, h, :, 0] |= keep_first
        expected[b, h] |= np.eye(blocks, dtype=bool) & keep_diagonal
    assert not expected[..., 0].all() or keep_first
    assert not expected.diagonal(axis1=2, axis2=3).all() or keep_diagonal
    levels = jax.jit(system.select)(query, key)
    near_ties.most(decided)
    np.testing.assert_array_equal(np.asarray(levels.to_mask())[decided], expected[decided])
    output = jax.jit(system)(query, key, value)
    seen = tokens_of(expected, query.shape[1], key.shape[1], is_causal=True)
    rows = decided.repeat(BLOCK, 2)[:, :, : query.shape[1]].swapaxes(1, 2)
    assert_close(output, oracle.attention(query, key, value, seen), "float32", rows=rows)


@pytest.mark.parametrize(("pool", "keep_first"), [(("mean", "max"), False), (("max", "mean"), True), ("max", False)])
def test_pbs_pools_thresholds_and_the_first_block(pool, keep_first):
    query, key, _ = draw()
    thresholds, segment = (0.0, 0.3, 0.6, 1.0), 2 * BLOCK
    blocks = -(-query.shape[1] // BLOCK)
    expected, decided = np.zeros((2, 4, blocks, blocks), bool), np.ones((2, 4, blocks), bool)
    describe = {"mean": padded_mean, "max": lambda x: np.pad(x, ((0, BLOCK - len(x)), (0, 0))).max(0)}
    pools = (pool, pool) if isinstance(pool, str) else pool
    for b, h in np.ndindex(2, 4):
        heads = query[b, :, h].astype(np.float64), key[b, :, h // 2].astype(np.float64)
        order, decided[b, h] = order_pbs(*heads, segment)
        parts = [[x[i * BLOCK : (i + 1) * BLOCK] for i in range(blocks)] for x in (heads[0], heads[1][order])]
        known = [np.stack([describe[one](part) for part in x]) for one, x in zip(pools, parts, strict=True)]
        for i in range(blocks):
            own = i // 2 * 2  # first block of the segment
            expected[b, h, i, own : own + 2] = True
            if own:
                weights, error = softmax(known[1][:own] @ known[0][i] * 8**-0.5)
                kept = top_p(weights, thresholds[h])
                expected[b, h, i, kept or [weights.argmax()]] = True
                is_best = np.arange(own) == weights.argmax()
                decided[b, h, i] &= (
                    is_prefix_decided(weights, error, kept, thresholds[h])
                    if kept
                    else near_ties.is_decided(weights, error, is_best)
                )
        if keep_first:
            expected[b, h, :, order.index(0) // BLOCK] = True
    options = {"block_size": BLOCK, "segment_size": segment, "pool": pool, "keep_first": keep_first}
    system = PBSAttention(threshold=thresholds, **options)
    levels = jax.jit(system.select)(query, key)
    near_ties.most(decided)
    np.testing.assert_array_equal(np.asarray(levels.to_mask())[decided], expected[decided])
    with pytest.raises(ValueError, match="pool"):
        PBSAttention(pool=("mean", "least"))
    with pytest.raises(ValueError, match="threshold"):
        PBSAttention(**options, threshold=(0.1, 0.2)).select(query, key)


def test_sla_without_critical_blocks_is_its_linear_part():
    query, key, value, projection, bias, _ = draw_sla()
    sla = SLA(**SIZES, density=0.09, linear_keys="marginal")  # of ten blocks none are critical
    output = jax.jit(sla)(query, key, value, projection, bias)
    features = [softmax(x.astype(np.float64))[0] for x in (query, key.repeat(2, 2))]
    weight = np.einsum("bthd,bshd->bhts", *features)
    linear = np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), value.repeat(2, 2).astype(np.float64))
    assert_close(output, linear @ projection + bias, "float32")


def test_psa_tile_size_and_least_exact_share():
    query, key, _, offsets = test_psa.draw()
    scores = test_psa.expect_scores(query, key, offsets, 16**-0.5)
    options = {"rule": "energy", "bounds": (0.0, 0.4, 0.6, 0.7), "tile_size": 16, "least_exact_share": 0.3}
    levels = jax.jit(PSA(**test_psa.SIZES, **options).select)(query, key, offsets)
    size = scores.shape[-1]
    error = 2 * (size + 2 + near_ties.EXP) * near_ties.UNIT  # of two sums of quotients of exp, as a share
    decided, wanted = np.ones(scores.shape[:3], bool), np.zeros(scores.shape, int)
    for place in np.ndindex(scores.shape[:3]):
        ranking = np.argsort(-scores[place], kind="stable")
        share = np.cumsum(scores[place][ranking]) / scores[place].sum()
        expected, last = np.zeros(size, int), 0
        for level, bound in zip((1, 2, 4, 8), options["bounds"], strict=True):
            within = int((share <= bound + 1e-6).sum())
            end = max(last, min(size, within + 1 if within else last))
            end = max(end, int(0.3 * size) + 1) if level == 1 else end
            if level == 8:  # two blocks of eight means fill a tile of sixteen
                end = last + -(-(end - last) // 2) * 2
                end = end if end < size else last + (size - last) // 2 * 2
            expected[ranking[last:end]] = level
            decided[place] &= (np.abs(share - bound - 1e-6) > error).all()
            if 0 < end < size:
                gap = scores[place][ranking[end - 1]] - scores[place][ranking[end]]
                decided[place] &= gap == 0 or gap > error * scores[place].max()  # equal logits have equal weights
            last = end
        wanted[place] = expected
    near_ties.most(decided)
    np.testing.assert_array_equal(np.asarray(levels.levels)[decided], wanted[decided])


def test_psa_older_kernel_reads_no_strays():
    arrays = test_psa.draw(tokens=200, heads=2)
    newer_kernel = Published(**test_psa.SIZES, bounds=(0.0, 0.0, 0.0, 1.0))
    levels = newer_kernel.select(*arrays[:2], arrays[3])
    assert ((np.asarray(levels.levels) == 8).sum(-1) >= 2).any()

    older_kernel = dataclasses.replace(newer_kernel, is_older_kernel=True)
    older, newer = jax.jit(lambda *arrays: (older_kernel(*arrays), newer_kernel(*arrays)))(*arrays)
    assert_close(older, test_psa.expect_attention(*arrays[:3], np.asarray(levels.levels), filled_to=256), "float32")
    assert np.abs(newer - older).max() > 1e-3


def test_a_share_of_one_keeps_all_that_has_mass():
    probability = np.array([[0.0, 1e-12, 1.0, 1e-9, 1e-20]], np.float32)
    np.testing.assert_array_equal(choose.top_p(probability, 1.0), probability > 0)
    np.testing.assert_array_equal(choose.top_p(probability, 0.999), probability == 1)
