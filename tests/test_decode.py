"""Decoding: however a row is cut into calls, choices and outputs are those of the whole row, by NumPy loops."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from sparse_attn import BlockSelection, moba_attention
from sparse_attn.attend.backends import Xla
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
    value_head_dim: int = HEAD_DIM

    def __str__(self):
        attention = type(self.attention).__name__, *dataclasses.astuple(self.attention)[:2]
        return "-".join(map(str, (*attention, f"{self.heads}:{self.kv_heads}", self.width, self.dtype)))


def draw_row(layer, seed):
    """Query, raw key, value `[batch, tokens, heads, head_dim]` of multiples of 1/8, and the kernel."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return near_ties.eighths(random.standard_normal(shape)).astype(cases.as_dtype(layer.dtype))

    kernel = draw(layer.width, layer.kv_heads, HEAD_DIM) if layer.width else None
    shapes = (layer.heads, HEAD_DIM), (layer.kv_heads, HEAD_DIM), (layer.kv_heads, layer.value_head_dim)
    return [draw(BATCH, TOKENS, *shape) for shape in shapes], kernel


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
    rows = STEP * layer.heads // layer.kv_heads
    with mock.patch.object(moba, "_TABLE_ROWS", rows):
        if not isinstance(attention, MoBA):
            return *attention.attend_cached(*arrays, cache, **options), None
        query, key, value = arrays
        cache = extend_moba_cache(cache, key, value, **options)
        backend = attention.implementation or Xla(cached_rows=rows)
        sizes = {"top_k": attention.top_k, "num_new": num_new, "implementation": backend}
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
        BATCH, TOKENS, layer.kv_heads, HEAD_DIM, value_head_dim=layer.value_head_dim, key_conv_width=layer.width,
        max_draft=DRAFT, dtype=arrays[0].dtype,
    )  # fmt: skip
    output, indices = np.zeros((BATCH, TOKENS, layer.heads, layer.value_head_dim)), None
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
    Layer(MoBA(block_size=4, top_k=3), value_head_dim=6),
    Layer(MoBA(block_size=1, top_k=5), heads=4, kv_heads=1),
    Layer(MoBA(block_size=8, top_k=2), heads=16, kv_heads=2, dtype="bfloat16"),
    Layer(MoBA(block_size=2, top_k=1), heads=7, kv_heads=1, width=1),
    Layer(FlashMoBA(block_size=5, top_k=3), heads=3, kv_heads=1, width=3),
    Layer(FlashMoBA(block_size=16, top_k=2), heads=4, kv_heads=2, width=5),
    Layer(MoBA(block_size=64, top_k=2, implementation="reference")),
    Layer(SlidingWindow(window_size=6), heads=4, kv_heads=2, width=3),
    Layer(SlidingWindow(window_size=11), dtype="bfloat16", value_head_dim=6),
    Layer(Dense(), heads=4, kv_heads=2, width=3),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@settings(max_examples=6)
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


SMALL = {"block_size": 4, "top_k": 2}


def draw(heads=4, kv_heads=2, tokens=TOKENS, seed=0, batch=BATCH):
    random = np.random.default_rng(seed)
    shapes = ((batch, tokens, number, HEAD_DIM) for number in (heads, kv_heads, kv_heads))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def filled(key, value, max_length=TOKENS, **options):
    """A cache of blocks of 4 with these tokens."""
    batch, _, *heads = key.shape
    cache = init_moba_cache(batch, max_length, *heads, block_size=4, dtype=key.dtype, **options)
    return jax.jit(extend_moba_cache)(cache, key, value)


@pytest.mark.parametrize(("last", "implementation"), [(3, Xla()), (3, "reference"), (TOKENS, Xla())])
def test_a_given_choice_is_attended(last, implementation):
    """Even one with blocks of the future, beyond the cache, twice, or without the query's own."""
    query, key, value = draw()
    indices = np.random.default_rng(1).integers(-1, 12, (BATCH, 4, TOKENS, 3))
    choice = BlockSelection(jnp.asarray(indices[:, :, -last:], jnp.int32), block_size=4, num_blocks=10)
    attend = functools.partial(moba_cached_attention, top_k=2, selection=choice, implementation=implementation)
    output = jax.jit(attend)(query[:, -last:], filled(key, value))
    expected = oracle.attention(query, key, value, oracle.attention_mask(indices, num_keys=TOKENS, block_size=4))
    cases.assert_close(output, expected[:, -last:], "float32")


def test_a_long_row_is_not_attended_densely():
    query, key, value = draw()
    output = jax.jit(functools.partial(moba_cached_attention, top_k=2))(query[:, -1:], filled(key, value))
    everything = np.broadcast_to(np.tri(TOKENS, dtype=bool), (BATCH, 4, TOKENS, TOKENS))
    dense = oracle.attention(query, key, value, everything)[:, -1:]
    assert (np.abs(output - dense).max((1, 3)) > 1e-2).all()  # in every row and head


def test_a_packed_prompt_goes_on_with_a_row_for_each_segment():
    lengths = np.array([9, 14, 5])  # of prompts, packed into one row; each goes on to 16 tokens
    arrays = draw(tokens=16, batch=3)
    packed = [np.concatenate([array[row, :n] for row, n in enumerate(lengths)])[None] for array in arrays]
    ids = np.repeat(np.arange(3), lengths)[None]
    prompt = jax.jit(functools.partial(moba_attention, is_causal=True, segment_ids=ids, **SMALL))(*packed)[0]
    expected = oracle.moba(*arrays, **SMALL)
    cases.assert_close(prompt, np.concatenate([expected[row, :n] for row, n in enumerate(lengths)]), "float32")
    attention = MoBA(**SMALL)
    step = jax.jit(lambda cache, num_new, *arrays: attention.attend_cached(*arrays, cache, num_new=num_new))
    _, cache = step(attention.init_cache(3, 16, 2, HEAD_DIM), lengths, *arrays)  # what follows a prompt is not taken
    rest = [np.stack([np.roll(array[row], -n, 0) for row, n in enumerate(lengths)]) for array in arrays]
    output, _ = step(cache, 16 - lengths, *rest)
    for row, n in enumerate(lengths):
        cases.assert_close(output[row, : 16 - n], expected[row, n:], "float32")


def test_overflow_is_an_error_where_lengths_are_known():
    query, key, value = draw(tokens=10)
    cache = filled(key[:, :9], value[:, :9], max_length=10)
    with pytest.raises(ValueError, match="max_length=10"):
        extend_moba_cache(cache, key[:, :2], value[:, :2])
    with pytest.raises(ValueError, match="length must lie between"):
        rollback(cache, [9, 10])
    with pytest.raises(ValueError, match="length must lie between"):
        rollback(cache, [-1, 9])
    for attention, options in ((SlidingWindow(window_size=4), {}), (Dense(), {"key_conv_width": 3})):
        cache = attention.init_cache(BATCH, 10, 2, HEAD_DIM, max_draft=1, **options)
        kernel = np.ones((3, 2, HEAD_DIM), np.float32) if options else None
        fill = jax.jit(functools.partial(attention.attend_cached, key_conv_kernel=kernel))
        _, cache = fill(query, key, value, cache)
        with pytest.raises(ValueError, match="max_length=10"):
            attention.attend_cached(query[:, :1], key[:, :1], value[:, :1], cache, key_conv_kernel=kernel)
        with pytest.raises(ValueError, match="max_draft=1"):
            rollback(cache, [9, 8])
        assert rollback(cache, [9, 0]).written.tolist() == [10, 0]


@pytest.mark.parametrize(
    "attention", [MoBA(**SMALL), SlidingWindow(window_size=3), Dense()], ids=lambda a: type(a).__name__
)
def test_overflow_in_jit_spoils_nothing_and_is_seen(attention):
    query, key, value = draw(tokens=12)
    start = attention.init_cache(BATCH, 10, 2, HEAD_DIM)

    @jax.jit
    def attend(cache, num_new, *arrays):
        return attention.attend_cached(*arrays, cache, num_new=num_new)

    output, cache = attend(start, np.array([12, 10]), query, key, value)
    expected, fitting = attend(start, np.array([10, 10]), query, key, value)
    np.testing.assert_array_equal(np.isnan(output).any((2, 3)), [[False] * 10 + [True] * 2, [False] * 12])
    np.testing.assert_array_equal(output[:, :10], expected[:, :10])
    assert cache.length.tolist() == [12, 10]
    np.testing.assert_array_equal(cache.key, fitting.key)
    np.testing.assert_array_equal(cache.value, fitting.value)
    again, _ = attend(cache, np.array([1, 0]), query, key, value)
    assert np.isnan(again[0, 0]).all()
    lost = jax.jit(rollback)(fitting, np.array([10, 11]))
    assert lost.length.tolist() == [10, 11]
    assert np.isnan(attend(lost, np.array([0, 1]), query, key, value)[0][1, 0]).all()

    checked = jax.jit(checkify.checkify(attend, errors=checkify.nan_checks))
    assert "nan" in checked(start, jnp.array([12, 10]), query, key, value)[0].get()
    assert checked(start, jnp.array([10, 9]), query, key, value)[0].get() is None


def test_one_compilation_serves_all_lengths():
    query, key, value = draw()
    attention, count = MoBA(**SMALL), 0

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, *arrays):
        nonlocal count
        count += 1
        return attention.attend_cached(*arrays, cache)[::-1]

    cache = attention.init_cache(BATCH, TOKENS, 2, HEAD_DIM)
    for token in range(TOKENS):
        cache, output = step(cache, *(array[:, token : token + 1] for array in (query, key, value)))
    assert count == step._cache_size() == 1
    expected = oracle.moba(query, key, value, **SMALL)
    cases.assert_close(output, expected[:, -1:], "float32")


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("width", [0, 3])
def test_a_donated_cache_is_not_copied(tokens, width):
    attention = MoBA(block_size=16, top_k=4)
    cache = jax.eval_shape(lambda: attention.init_cache(2, 16384, 2, 24, key_conv_width=width))
    shapes = [jax.ShapeDtypeStruct((2, tokens, heads, 24), jnp.float32) for heads in (2, 2, 2)]
    kernel = jax.ShapeDtypeStruct((width, 2, 24), jnp.float32) if width else None

    def step(cache, kernel, *arrays):
        return attention.attend_cached(*arrays, cache, key_conv_kernel=kernel)

    program = jax.jit(step, donate_argnums=0).lower(cache, kernel, *shapes).compile()
    memory = program.memory_analysis()
    # A quarter of the means for a step, a third of the keys for a chunk.
    assert memory.temp_size_in_bytes < (cache.mean.size if tokens == 1 else 4 * cache.key.size / 3)
    assert memory.alias_size_in_bytes > 2 * 4 * cache.key.size
    elements = {cache.key.size, cache.mean.size} if tokens == 1 else {cache.key.size}
    for shape, operation in re.findall(r"= \w+\[([\d,]+)\]\S* (\w[\w-]*)\(", program.as_text()):
        if operation in ("copy", "pad", "transpose", "concatenate", "gather", "select"):
            assert math.prod(map(int, shape.split(","))) not in elements, (operation, shape)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", {"key": np.zeros((2, 3, 4, 4), np.float32)}),
        ("key", {"key": np.zeros((2, 3, 2, 4), np.float16)}),
        ("key", {"key": np.zeros((2, 0, 2, 4), np.float32)}),
        ("value", {"value": np.zeros((2, 3, 2, 5), np.float32)}),
        ("value", {"value": np.zeros((2, 4, 2, 4), np.float32)}),
        ("query", {"query": np.zeros((2, 3, 3, 4), np.float32)}),
        ("query", {"query": np.zeros((1, 3, 4, 4), np.float32)}),
        ("query", {"query": np.zeros((2, 3, 4, 4), np.float16)}),
        ("num_new", {"num_new": [1]}),
        ("num_new", {"num_new": [1.0, 2.0]}),
        ("key_conv_kernel", {"key_conv_kernel": np.zeros((3, 2, 4), np.float32)}),
    ],
)
def test_bad_arguments_are_named_S10(name, change):
    query, key, value = draw(tokens=3)
    arguments = {"query": query, "key": key, "value": value} | change
    for attention in (MoBA(**SMALL), SlidingWindow(window_size=4), Dense()):
        with pytest.raises(ValueError, match=name):
            attention.attend_cached(**arguments, cache=attention.init_cache(2, 20, 2, 4))


def test_bad_sizes_are_named_S10():
    sizes = {"batch_size": 1, "max_length": 8, "num_key_value_heads": 1, "head_dim": 4}
    bad = {name: 0 for name in sizes} | {"value_head_dim": 0, "key_conv_width": -1, "max_draft": -1, "dtype": "int32"}
    for attention in (MoBA(**SMALL), SlidingWindow(window_size=4), Dense()):
        for name, wrong in bad.items():
            with pytest.raises(ValueError, match=name):
                attention.init_cache(**(sizes | {name: wrong}))
    for attention in (MoBA(**SMALL, is_causal=False), Dense(is_causal=False)):
        with pytest.raises(ValueError, match="is_causal"):
            attention.init_cache(1, 8, 1, 4)
    query, key, value = draw()
    cache = filled(key, value)
    choice = BlockSelection(jnp.zeros((BATCH, 4, 1, 1), jnp.int32), block_size=8, num_blocks=5)
    for name, options in (
        ("top_k", {"top_k": 0}), ("scale", {"top_k": 1, "scale": np.inf}),
        ("selection.block_size", {"top_k": 1, "selection": choice}),
        ("selection.indices", {"top_k": 1, "selection": dataclasses.replace(choice, indices=choice.indices[:1])}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            moba_cached_attention(query[:, :1], cache, **options)
    with pytest.raises(ValueError, match="block_size=2"):
        MoBA(block_size=2, top_k=1).attend_cached(query[:, :1], key[:, :1], value[:, :1], cache)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        query, key, value = (array.astype(np.float64) for array in draw())
        cache = filled(key, value)
        assert {cache.key.dtype, cache.mean.dtype} == {np.dtype("float64")}
        output = jax.jit(functools.partial(moba_cached_attention, top_k=2))(query[:, -STEP:], cache)
        expected = oracle.moba(query, key, value, **SMALL)
        cases.assert_close(output, expected[:, -STEP:], "float64")
