"""Decoding: however a row is cut into calls, choices and outputs are those of the whole row, by NumPy loops."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.decode import extend_moba_cache, init_moba_cache, moba_cached_attention, rollback
from tests import cases, oracle

BATCH, TOKENS, HEAD_DIM = 2, 40, 4
STEP, CHUNK = 3, 13  # tokens of a short and of a long call


@dataclasses.dataclass(frozen=True)
class Model:
    """What is fixed while a row grows: one compilation each."""

    block_size: int
    group: int = 1
    kv_heads: int = 2
    top_k: int = 3
    width: int = 0
    dtype: str = "float32"
    max_draft: int = 2

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


def draw_row(model, seed, is_exact=True):
    """Query, raw key, value `[batch, tokens, heads, head_dim]` and the kernel of the convolution."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        numbers = random.standard_normal(shape)
        return np.asarray(np.round(8 * numbers) / 8 if is_exact else numbers, cases.as_dtype(model.dtype))

    shape = (BATCH, TOKENS)
    kernel = draw(model.width, model.kv_heads, HEAD_DIM) if model.width else None
    heads = (model.heads, model.kv_heads, model.kv_heads)
    return *(draw(*shape, number, HEAD_DIM) for number in heads), kernel


@functools.partial(jax.jit, static_argnames="model")
def call(cache, query, key, value, kernel, num_new, selection=None, *, model):
    cache = extend_moba_cache(cache, key, value, key_conv_kernel=kernel, num_new=num_new)
    output, choice = moba_cached_attention(
        query, cache, top_k=model.top_k, num_new=num_new, selection=selection, return_selection=True
    )
    return cache, output, choice.indices


def cut(array, start, num_new, size):
    """`[batch, size, ...]`: num_new tokens of each row from start on, and NaN."""
    piece = np.full((array.shape[0], size, *array.shape[2:]), np.nan, array.dtype)
    for row, (first, count) in enumerate(zip(start, num_new, strict=True)):
        piece[row, :count] = array[row, first : first + count]
    return piece


def grow(model, arrays, splits, new=None):
    """Outputs and choices of whole rows, through calls of `splits`: pairs of counts a row, and tokens taken back."""
    query, key, value, kernel = arrays
    cache = init_moba_cache(
        BATCH, TOKENS, model.kv_heads, HEAD_DIM, block_size=model.block_size, key_conv_width=model.width,
        max_draft=model.max_draft, dtype=query.dtype,
    )  # fmt: skip
    output = np.zeros(query.shape, np.float64)
    indices = np.full((BATCH, model.heads, TOKENS, min(model.top_k, cache.num_blocks)), -2)
    length, longest = np.zeros((2, BATCH), int)
    for counts, back in splits:
        num_new = np.minimum(counts, TOKENS - length)
        size = STEP if max(num_new) <= STEP else CHUNK
        pieces = (cut(array, length, num_new, size) for array in (query, key, value))
        cache, out, chosen = call(cache, *pieces, kernel, num_new, model=model)
        for row, (first, count) in enumerate(zip(length, num_new, strict=True)):
            output[row, first : first + count] = out[row, :count]
            indices[row, :, first : first + count] = chosen[row, :, :count]
            np.testing.assert_array_equal(np.asarray(out[row, count:], np.float64), 0)
            np.testing.assert_array_equal(chosen[row, :, count:], -1)
        length += num_new
        longest = np.maximum(longest, length)
        length = np.maximum(length - back, longest - model.max_draft)
        length = np.maximum(length, 0)
        cache = rollback(cache, length)
        np.testing.assert_array_equal(cache.length, length)
    return output, indices, length


MODELS = (
    Model(block_size=4),
    Model(block_size=1, group=4, top_k=5),
    Model(block_size=8, group=2, width=3),
)


@pytest.mark.parametrize("model", MODELS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_the_law(model, data):
    arrays = draw_row(model, data.draw(st.integers(0, 99)))
    counts = st.lists(st.integers(0, CHUNK), min_size=BATCH, max_size=BATCH).map(np.array)
    back = st.lists(st.integers(0, model.max_draft), min_size=BATCH, max_size=BATCH).map(np.array)
    splits = data.draw(st.lists(st.tuples(counts, back), min_size=4, max_size=9))
    output, indices, length = grow(model, arrays, splits)
    query, key, value, kernel = arrays
    if kernel is not None:
        from sparse_attn import causal_key_convolution

        key = np.asarray(causal_key_convolution(key, kernel))
    want, gap = oracle.route(query, key, block_size=model.block_size, top_k=indices.shape[-1])
    expected = oracle.moba(query, key, value, block_size=model.block_size, top_k=model.top_k)
    for row, stop in enumerate(length):
        if model.width == 0:
            np.testing.assert_array_equal(indices[row, :, :stop], want[row, :, :stop])
            cases.assert_close(output[row, :stop], expected[row, :stop], model.dtype)
        else:
            clear = gap[row, :, :stop] > 0
            np.testing.assert_array_equal(indices[row, :, :stop][clear], want[row, :, :stop][clear])
