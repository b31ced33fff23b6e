"""XAttention, Prism, PBS-Attn and ProxyAttn, by loops in float64: choices, and attention to a mask of tokens.

Numbers are multiples of 1/8, so that products of tokens and of means are exact. What is rounded is a logit's factor,
and the softmax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar.grid import Grid
from sparse_attn.systems.pbs_attention import PBSAttention
from sparse_attn.systems.prism import Prism
from sparse_attn.systems.proxy_attention import ProxyAttention
from sparse_attn.systems.xattention import XAttention
from tests import near_ties, oracle
from tests.cases import assert_close

BLOCK = 8
XATTENTION = XAttention(threshold=0.6, stride=4, block_size=BLOCK)
PBS = PBSAttention(threshold=0.5, block_size=BLOCK, segment_size=2 * BLOCK)
SYSTEMS = (
    XATTENTION,
    Prism(high_size=4, low_size=6, high_threshold=0.5, low_threshold=0.6, block_size=BLOCK),
    PBS,
    ProxyAttention(num_proxies=1, stride=2, mass=0.4, min_tokens=1, block_size=BLOCK),
)
every_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)


@functools.cache
def draw(tokens=44, dtype=np.float32):
    """Two rows, two key/value heads of two query heads each, peaked enough that choices differ."""
    random = np.random.default_rng(0)
    query = 2 * random.standard_normal((2, tokens, 4, 8))
    key, value = random.standard_normal((2, 2, tokens, 2, 8))
    return tuple(near_ties.eighths(array).astype(dtype) for array in (query, key, value))


@functools.cache
def compiled(system):
    return jax.jit(system)


def softmax(logits, roundings=2):
    """Softmax of exact products that were multiplied by a factor, and how far a float32 one may lie from it."""
    return near_ties.softmax(logits, roundings * near_ties.UNIT * np.abs(np.nan_to_num(logits, neginf=0)))


def top_p(mass, share, first=()):
    """Indices of the shortest prefix by falling mass, the entries of `first` before all others."""
    others = sorted((j for j in range(len(mass)) if j not in first), key=lambda j: (-mass[j], j))
    kept, total = list(first), sum(mass[j] for j in first)
    for j in others:
        if total >= share * sum(mass) or mass[j] == 0:
            break
        kept.append(j)
        total += mass[j]
    return kept


def is_prefix_decided(mass, error, kept, share, first=()):
    """`near_ties.is_prefix_decided` of a list of indices."""
    place = np.arange(len(mass))
    return near_ties.is_prefix_decided(mass, error, np.isin(place, kept), share, np.isin(place, list(first)))


def padded_mean(block):
    return np.concatenate([block, np.zeros((BLOCK - len(block), block.shape[1]))]).mean(0)


def choose_xattention(query, key, system):
    """Key blocks of every query block of one head, and whether no rounding changes them; arrays [tokens, head_dim]."""
    tokens, stride = len(query), system.stride
    query, key = (np.pad(x, ((0, -tokens % BLOCK), (0, 0))) for x in (query, key))
    tiles = -(-tokens // stride)
    logits = np.full((tiles, tiles), -np.inf)
    for r, c in np.ndindex(tiles, tiles):
        if c <= r:
            tile = query[r * stride : (r + 1) * stride] @ key[c * stride : (c + 1) * stride].T * 8**-0.5
            logits[r, c] = np.mean([tile[stride - 1 - n, n] for n in range(stride)])
    side, weights, chosen, decided = BLOCK // stride, softmax(logits), [], []
    for i in range(-(-tokens // BLOCK)):
        rows, blocks = slice(i * side, (i + 1) * side), [slice(j * side, (j + 1) * side) for j in range(i + 1)]
        mass, error = (np.array([x[rows, block].sum() for block in blocks]) for x in weights)
        error = error + side**2 * near_ties.UNIT * mass
        chosen.append(top_p(mass, system.threshold, {0, i}))
        decided.append(is_prefix_decided(mass, error, chosen[-1], system.threshold, {0, i}))
    return chosen, decided


def choose_prism(query, key, system):
    means = [np.stack([padded_mean(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)]) for x in (query, key)]
    pairs = np.arange(4)
    chosen, decided = [{0, i} for i in range(len(means[0]))], np.ones(len(means[0]), bool)
    for size, kept, threshold in (
        (system.high_size, pairs[: system.high_size // 2], system.high_threshold),
        (system.low_size, pairs[4 - system.low_size // 2 :], system.low_threshold),
    ):
        features = np.concatenate([kept, kept + 4])
        rms = [np.sqrt((x[:, features] ** 2).mean()) / np.sqrt((x**2).mean()) for x in means]
        logits = means[0][:, features] @ means[1][:, features].T / (size**0.5 * (size / 8) ** 0.5 * rms[0] * rms[1])
        for i, row in enumerate(logits):
            mass, error = softmax(row[: i + 1], roundings=20)  # four roots of exact sums, and what is made of them
            kept = top_p(mass, threshold)
            chosen[i] |= set(kept)
            decided[i] &= is_prefix_decided(mass, error, kept, threshold)
    return chosen, decided


def order_pbs(query, key, segment_size):
    """The order of keys, and whether no rounding changes which keys make up a block."""
    whole = len(key) // segment_size * segment_size
    weights, error = (x.mean(0) for x in softmax(query[-BLOCK:] @ key[:whole].T * 8**-0.5))
    error = error + (BLOCK + 1) * near_ties.UNIT * weights
    order, decided = list(range(len(key))), True
    for start in range(0, whole, segment_size):
        segment = order[start : start + segment_size]
        order[start : start + segment_size] = ranking = sorted(segment, key=lambda s: -weights[s])
        for end in range(BLOCK, segment_size, BLOCK):
            decided &= near_ties.is_decided(weights[segment], error[segment], np.isin(segment, ranking[:end]))
    return order, decided


def choose_pbs(query, key, system):
    threshold, segment_size = system.threshold, system.segment_size
    order, is_ordered = order_pbs(query, key, segment_size)
    key = key[order]
    means = [np.stack([padded_mean(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)]) for x in (query, key)]
    chosen, decided = [], []
    for i, mean in enumerate(means[0]):
        segment = i * BLOCK // segment_size
        earlier = segment * segment_size // BLOCK
        mass, error = softmax(means[1][:earlier] @ mean * 8**-0.5) if earlier else np.zeros((2, 0))
        kept = top_p(mass, threshold)
        decided.append(is_ordered & is_prefix_decided(mass, error, kept, threshold))
        first = order.index(0) // BLOCK
        own = range(earlier, min(earlier + segment_size // BLOCK, len(means[0])))
        chosen.append({*kept, *own, *([first] if first * BLOCK // segment_size <= segment else [])})
    return chosen, decided


def choose_proxy(query, key, proxy_query, proxy_key, system):
    tokens, mass = len(query), system.mass
    kept = np.arange(0, tokens, system.stride)
    causal = np.where(kept[None] <= kept[:, None], proxy_query[kept] @ proxy_key[kept].T * 8**-0.5, -np.inf)
    (weights, errors), blocks = softmax(causal), range(-(-tokens // BLOCK))
    last = np.arange(tokens)[-BLOCK:]
    real = softmax(np.where(np.arange(tokens)[None] <= last[:, None], query[last] @ key.T * 8**-0.5, -np.inf))
    pooled, error = (np.array([x[:, j * BLOCK : (j + 1) * BLOCK].sum() for j in blocks]) for x in real)
    kept_of_last = top_p(pooled, mass)
    error += 2 * BLOCK * near_ties.UNIT * pooled
    is_counted = is_prefix_decided(pooled, error, kept_of_last, mass)
    budget = max(len(kept_of_last), -(-system.min_tokens // BLOCK))
    chosen, decided = [], []
    for i in blocks:
        pairs = [np.ix_(kept // BLOCK == i, kept // BLOCK == j) for j in range(i + 1)]
        scores, error = (np.array([x[pair].max() for pair in pairs]) for x in (weights, errors))
        scores[i] = np.inf
        chosen.append(sorted(range(i + 1), key=lambda j: (-scores[j], j))[:budget])
        decided.append(is_counted & near_ties.is_decided(scores, error, np.isin(range(i + 1), chosen[-1])))
    return chosen, decided


def expected_mask(system, query, key):
    """The choice by loops.

    Returns:
      choice: bool [batch, heads, blocks, blocks], over blocks of sorted keys for PBS-Attn.
      mask: bool [batch, heads, tokens, tokens] over keys in their own order.
      decided: bool [batch, heads, blocks], the rows that no rounding changes.
    """
    batch, tokens, heads, _ = query.shape
    query, key = query.astype(np.float64), key.astype(np.float64)
    blocks = -(-tokens // BLOCK)
    choice = np.zeros((batch, heads, blocks, blocks), bool)
    mask = np.zeros((batch, heads, tokens, tokens), bool)
    decided = np.zeros((batch, heads, blocks), bool)
    for b, h in np.ndindex(batch, heads):
        arrays = query[b, :, h], key[b, :, h // 2]
        order = np.arange(tokens)
        match system:
            case XAttention():
                chosen, decided[b, h] = choose_xattention(*arrays, system)
            case Prism():
                chosen, decided[b, h] = choose_prism(*arrays, system)
            case PBSAttention() if tokens > system.segment_size:
                chosen, decided[b, h] = choose_pbs(*arrays, system)
                order = np.array(order_pbs(*arrays, system.segment_size)[0])
            case PBSAttention():  # a single segment is dense
                chosen, decided[b, h] = [range(blocks)] * blocks, True
            case ProxyAttention():
                chosen, decided[b, h] = choose_proxy(*arrays, query[b].mean(1), key[b].mean(1), system)
        for i, js in enumerate(chosen):
            choice[b, h, i, list(js)] = True
        seen = choice[b, h].repeat(BLOCK, 0).repeat(BLOCK, 1)[:tokens, :tokens]
        mask[b, h][:, order] = seen
    return choice, mask & np.tri(tokens, dtype=bool), near_ties.most(decided)


def queries_of(decided, tokens=44):
    """Rows of blocks as queries, bool [batch, tokens, heads]."""
    return decided.repeat(BLOCK, 2)[:, :, :tokens].swapaxes(1, 2)


@every_system
def test_choice_and_output_equal_loops(system):
    query, key, value = draw()
    choice, mask, decided = expected_mask(system, query, key)
    assert 0.2 < choice[:, :, -1].mean() < 0.95, "a choice worth testing"
    levels = jax.jit(system.select)(query, key)
    np.testing.assert_array_equal(levels.to_mask()[decided], choice[decided])
    output = compiled(system)(query, key, value)
    assert_close(output, oracle.attention(query, key, value, mask), "float32", queries_of(decided))


@every_system
def test_rows_of_a_batch_are_alone_and_types_stay(system):
    query, key, value = draw()
    both = compiled(system)(query, key, value)
    other_mate = compiled(system)(*(np.stack([array[1] * 3, array[1]]) for array in (query, key, value)))
    assert_close(both[1], other_mate[1], "float32")
    arrays = (jnp.asarray(array, jnp.bfloat16) for array in (query, key, value))
    assert jax.eval_shape(system, *arrays).dtype == jnp.bfloat16


CHANGES = ({"block_size": 0}, {"stride": 3}, {"segment_size": 12}, {"high_size": 3})


@pytest.mark.parametrize(
    ("system", "change"),
    [(system, change) for system in SYSTEMS for change in CHANGES if hasattr(system, *change)],
)
def test_bad_arguments_are_named(system, change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(system, **change)


@pytest.mark.parametrize("tokens", [5, 16])
def test_pbs_is_dense_up_to_one_segment(tokens):
    arrays = [array[:, :tokens] for array in draw()]
    output = compiled(PBS)(*arrays)
    mask = np.broadcast_to(np.tri(tokens, dtype=bool), (2, 4, tokens, tokens))
    assert_close(output, oracle.attention(*arrays, mask), "float32")


def test_queries_at_the_end_of_longer_keys():
    query, key, value = draw()
    whole = compiled(XATTENTION)(query, key, value)
    tail = compiled(XATTENTION)(query[:, 24:], key, value)
    *_, decided = expected_mask(XATTENTION, query, key)
    assert_close(tail, whole[:, 24:], "float32", queries_of(decided)[:, 24:])
    with pytest.raises(ValueError, match="whole blocks"):
        XATTENTION(query[:, 23:], key, value)


def test_packed_and_padded_rows_are_sequences_of_their_own():
    arrays = [array[:1] for array in draw()]
    ids = (np.arange(44)[None] % 3 == 0).astype(int)
    output = jax.jit(functools.partial(PBS, segment_ids=ids, seq_lengths=np.array([41])))(*arrays)
    for segment in (0, 1):  # of 27 and 14 tokens, of which the latter are dense
        places = np.flatnonzero(ids[0, :41] == segment)
        query, key, value = (array[:, places] for array in arrays)
        _, mask, decided = expected_mask(PBS, query, key)
        expected = oracle.attention(query, key, value, mask)
        assert_close(output[:, places], expected, "float32", queries_of(decided, len(places)))
    np.testing.assert_array_equal(output[0, 41:], 0)


def test_xattention_takes_a_threshold_for_each_head_and_looks_both_ways():
    query, key, _ = draw()
    thresholds = (0.1, 0.3, 0.6, 0.9)
    system = XAttention(threshold=thresholds, stride=4, block_size=BLOCK, is_causal=False)
    grid = Grid.of(query, key, BLOCK, is_causal=False)
    levels = jax.jit(system.select)(query, key)
    mass = jax.jit(functools.partial(system.scores, grid=grid))(query, key)
    mass, decided = np.asarray(mass, np.float64), np.zeros(mass.shape[:3], bool)
    for b, h, i in np.ndindex(decided.shape):
        expected = top_p(mass[b, h, i], thresholds[h])
        decided[b, h, i] = is_prefix_decided(mass[b, h, i], 0, expected, thresholds[h])  # the masses are the library's
        if decided[b, h, i]:
            np.testing.assert_array_equal(np.flatnonzero(levels.levels[b, h, i]), sorted(expected))
    near_ties.most(decided)
    with pytest.raises(ValueError, match="threshold"):
        dataclasses.replace(system, threshold=(0.1, 0.2)).select(query, key)
