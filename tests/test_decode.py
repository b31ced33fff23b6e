"""Decoding: however a row is cut into calls, choices and outputs are those of the whole row, by NumPy loops."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from sparse_attn import BlockSelection, moba_attention
from sparse_attn.decode import extend_moba_cache, init_moba_cache, moba, moba_cached_attention, rollback
from sparse_attn.dense import Dense
from sparse_attn.systems.flash_moba import FlashMoBA
from sparse_attn.systems.moba import MoBA
from sparse_attn.window import SlidingWindow
from tests import cases, near_ties, oracle

pytestmark = pytest.mark.usefixtures("strict_ranks")
BATCH, TOKENS, HEAD_DIM, DRAFT = 2, 40, 4, 2
STEP, CHUNK = 3, 13  # tokens of a short and of a long call


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is fixed while a row grows: two compilations, of a short and of a long call."""

    attention: MoBA | SlidingWindow | Dense
    heads: int = 2
    kv_heads: int = 2
    width: int = 0
    dtype: str = "float32"

    def __str__(self):
        attention = type(self.attention).__name__, *dataclasses.astuple(self.attention)[:2]
        return "-".join(map(str, (*attention, f"{self.heads}:{self.kv_heads}", self.width, self.dtype)))


def draw_row(layer, seed):
    """Query, raw key, value `[batch, tokens, heads, head_dim]` of multiples of 1/8, and the kernel."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return near_ties.eighths(random.standard_normal(shape)).astype(cases.as_dtype(layer.dtype))

    heads = (layer.heads, layer.kv_heads, layer.kv_heads)
    kernel = draw(layer.width, layer.kv_heads, HEAD_DIM) if layer.width else None
    return [draw(BATCH, TOKENS, number, HEAD_DIM) for number in heads], kernel


def convolve(key, kernel):
    """key_t + silu(sum_l kernel[l] key_{t-l}) in float64, rounded to key's dtype."""
    if kernel is None:
        return key
    exact, mixture = key.astype(np.float64), np.zeros(key.shape)
    for lag, weight in enumerate(kernel.astype(np.float64)):
        mixture[:, lag:] += exact[:, : key.shape[1] - lag] * weight
    return (exact + mixture / (1 + np.exp(-mixture))).astype(key.dtype)


@functools.partial(jax.jit, static_argnames="layer")
def call(cache, arrays, kernel, num_new, *, layer):
    """One call of the attention; short ones gather blocks, long ones sort them."""
    attention, options = layer.attention, {"key_conv_kernel": kernel, "num_new": num_new}
    with mock.patch.object(moba, "_FEW_ROWS", STEP * layer.heads // layer.kv_heads):
        if not isinstance(attention, MoBA):
            return *attention.attend_cached(*arrays, cache, **options), None
        query, key, value = arrays
        cache = extend_moba_cache(cache, key, value, **options)
        sizes = {"top_k": attention.top_k, "num_new": num_new, "implementation": attention.implementation}
        output, choice = moba_cached_attention(query, cache, **sizes, return_selection=True)
        return output, cache, choice.indices


def cut(array, other, start, num_new, kept, size):
    """`[batch, size, ...]`: num_new tokens of each row from start on, those from kept on of the other, then NaN."""
    piece = np.full((BATCH, size, *array.shape[2:]), np.nan, array.dtype)
    for row in range(BATCH):
        stop = start[row] + num_new[row]
        tokens = np.concatenate([array[row, : kept[row]], other[row, kept[row] :]])
        piece[row, : num_new[row]] = tokens[start[row] : stop]
    return piece


def grow(layer, arrays, kernel, splits):
    """Whole rows through calls of `splits`: pairs of counts a row, and of draft tokens to take back.

    Tokens that are taken back are others than those that follow. Returns outputs, choices, and lengths in the end.
    """
    cache = layer.attention.init_cache(
        BATCH, TOKENS, layer.kv_heads, HEAD_DIM, key_conv_width=layer.width, max_draft=DRAFT, dtype=arrays[0].dtype
    )
    output, indices = np.zeros(arrays[0].shape), None
    length, longest = np.zeros((2, BATCH), int)
    for counts, back in splits:
        num_new = np.minimum(counts, TOKENS - length)
        stop = length + num_new
        longest = np.maximum(longest, stop)
        kept = np.maximum(np.maximum(stop - back, longest - DRAFT), 0)
        size = STEP if max(num_new) <= STEP else CHUNK
        pieces = [cut(array, -array[:, ::-1], length, num_new, kept, size) for array in arrays]
        out, cache, chosen = call(cache, pieces, kernel, num_new, layer=layer)
        if chosen is not None and indices is None:
            indices = np.full((BATCH, layer.heads, TOKENS, chosen.shape[-1]), -2)
        for row in range(BATCH):
            count = num_new[row]
            output[row, length[row] : stop[row]] = out[row, :count]
            np.testing.assert_array_equal(np.asarray(out[row, count:], np.float64), 0)
            if indices is not None:
                indices[row, :, length[row] : stop[row]] = chosen[row, :, :count]
                np.testing.assert_array_equal(chosen[row, :, count:], -1)
        length = np.minimum(stop, kept)
        cache = rollback(cache, length)
        np.testing.assert_array_equal(cache.length, length)
    return output, indices, length


def seen(layer, query, key, indices):
    """Which keys every query attends, bool `[batch, heads, queries, keys]`; for MoBA once its choice is checked."""
    attention, shape = layer.attention, (BATCH, layer.heads, TOKENS, TOKENS)
    distance = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    if isinstance(attention, MoBA):
        return oracle.attention_mask(indices, num_keys=TOKENS, block_size=attention.block_size)
    window = attention.window_size if isinstance(attention, SlidingWindow) else TOKENS
    return np.broadcast_to((distance >= 0) & (distance < window), shape)


LAYERS = (
    Layer(MoBA(block_size=4, top_k=3)),
    Layer(MoBA(block_size=1, top_k=5), heads=4, kv_heads=1),
    Layer(MoBA(block_size=8, top_k=2), heads=16, kv_heads=2, dtype="bfloat16"),
    Layer(MoBA(block_size=2, top_k=1), heads=7, kv_heads=1, width=1),
    Layer(FlashMoBA(block_size=5, top_k=3), heads=3, kv_heads=1, width=3),
    Layer(FlashMoBA(block_size=16, top_k=2), heads=4, kv_heads=2, width=5),
    Layer(MoBA(block_size=64, top_k=2, implementation="reference")),
    Layer(SlidingWindow(window_size=6), heads=4, kv_heads=2, width=3),
    Layer(SlidingWindow(window_size=11), dtype="bfloat16"),
    Layer(Dense(), heads=4, kv_heads=2, width=3),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_the_law(layer, data):
    (query, raw_key, value), kernel = draw_row(layer, data.draw(st.integers(0, 99)))

    def counts(most):
        return st.lists(st.integers(0, most), min_size=BATCH, max_size=BATCH).map(np.array)

    size = st.sampled_from([1, STEP, CHUNK]).flatmap(counts)
    splits = data.draw(st.lists(st.tuples(size, counts(DRAFT)), min_size=4, max_size=9))
    output, indices, length = grow(layer, (query, raw_key, value), kernel, splits)
    key = convolve(raw_key, kernel)
    if isinstance(layer.attention, MoBA):
        sizes = {"block_size": layer.attention.block_size, "top_k": indices.shape[-1]}
        want, gap = oracle.route(query, key, **sizes, input_error=0 if kernel is None else 1e-6)
        for row, stop in enumerate(length):
            decided = gap[row, :, :stop] > 0
            np.testing.assert_array_equal(indices[row, :, :stop][decided], want[row, :, :stop][decided])
            if kernel is None and sizes["block_size"] != 5:
                assert decided.all()
    expected = oracle.attention(query, key, value, seen(layer, query, key, indices))
    for row, stop in enumerate(length):
        cases.assert_close(output[row, :stop], expected[row, :stop], layer.dtype)
