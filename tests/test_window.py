"""Sliding-window attention against NumPy loops."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.window import sliding_window_attention
from tests import cases

pytestmark = pytest.mark.usefixtures("strict_ranks")


def attend(query, key, value, window_size, scale=None, segment_ids=None):
    """The definition, query by query in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    output = np.empty_like(query)
    group = query.shape[2] // key.shape[2]
    scale = 1 / np.sqrt(query.shape[3]) if scale is None else scale
    for row, token, head in np.ndindex(query.shape[:3]):
        seen = np.arange(max(0, token - window_size + 1), token + 1)
        if segment_ids is not None:
            seen = seen[segment_ids[row, seen] == segment_ids[row, token]]
        logits = scale * key[row, seen, head // group] @ query[row, token, head]
        weights = np.exp(logits - logits.max())
        output[row, token, head] = weights @ value[row, seen, head // group] / weights.sum()
    return output


def draw(seed, num_tokens=70, heads=2, kv_heads=1, head_dim=4, dtype="float32", batch=2):
    random = np.random.default_rng(seed)
    arrays = [
        random.standard_normal((batch, num_tokens, number, head_dim)).astype(cases.as_dtype(dtype))
        for number in (heads, kv_heads, kv_heads)
    ]
    segment_ids = np.sort(random.integers(-1, 3, (batch, num_tokens))).astype(np.int32)
    return arrays, segment_ids


jitted = jax.jit(sliding_window_attention, static_argnames=("window_size", "scale"))


@hypothesis.given(
    seed=st.integers(0, 99),
    # Shorter than a chunk, ragged, whole chunks; windows of 1, below, at and above a chunk and the sequence.
    size=st.sampled_from(
        [(1, 1), (5, 3), (40, 100), (64, 1), (70, 4), (70, 33), (70, 34), (70, 69), (70, 70), (99, 40)]
    ),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    is_packed=st.booleans(),
)
def test_attention_equals_its_definition(seed, size, heads, dtype, is_packed):
    num_tokens, window_size = size
    arrays, segment_ids = draw(seed, num_tokens, *heads, dtype=dtype)
    segment_ids = segment_ids if is_packed else None
    output = jitted(*arrays, window_size=window_size, segment_ids=segment_ids)
    assert output.dtype == arrays[0].dtype
    cases.assert_close(output, attend(*arrays, window_size, segment_ids=segment_ids), dtype)


@pytest.mark.parametrize(("num_tokens", "window_size"), [(600, 600), (700, 300)])
def test_long_windows_attend_part_by_part(num_tokens, window_size):
    arrays, segment_ids = draw(0, num_tokens, batch=1)
    output = jitted(*arrays, window_size=window_size, scale=0.3, segment_ids=segment_ids)
    cases.assert_close(output, attend(*arrays, window_size, 0.3, segment_ids), "float32")

    def plain(query, key, value):
        distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
        seen = (distance >= 0) & (distance < window_size) & (segment_ids[0][:, None] == segment_ids[0])
        logits = jnp.where(seen[None, None], 0.3 * jnp.einsum("bthd,bskd->bhts", query, key), -1e30)
        return jnp.einsum("bhts,bskd->bthd", jax.nn.softmax(logits), value)

    def gradients(function):
        return jax.jit(jax.grad(lambda *arrays: jnp.square(function(*arrays)).sum(), argnums=(0, 1, 2)))(*arrays)

    ours = gradients(functools.partial(jitted, window_size=window_size, scale=0.3, segment_ids=segment_ids))
    for actual, expected in zip(ours, gradients(plain), strict=True):
        cases.assert_close(actual, expected, "float32")


def test_float64_stays_float64():
    with jax.enable_x64(True):
        arrays, segment_ids = draw(3, dtype="float64")
        output = jitted(*arrays, window_size=40, segment_ids=segment_ids)
        assert output.dtype == jnp.float64
        cases.assert_close(output, attend(*arrays, 40, segment_ids=segment_ids), "float64")


def test_a_query_depends_on_its_window_alone():
    num_tokens, window_size = 70, 5
    arrays, _ = draw(1, num_tokens, batch=1)
    ids = np.array([[0] * 37 + [1] * 33], np.int32)

    def jacobian(argument):
        def tokens(array):
            inputs = [*arrays[:argument], array, *arrays[argument + 1 :]]
            return sliding_window_attention(*inputs, window_size=window_size, segment_ids=ids)[0].sum((-2, -1))

        return jax.jit(jax.jacrev(tokens))(jnp.asarray(arrays[argument]))[:, 0]  # [queries, tokens, heads, head_dim]

    distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
    expected = (distance >= 0) & (distance < window_size) & (ids == ids.T)
    np.testing.assert_array_equal(np.any(jacobian(2) != 0, axis=(2, 3)), expected)
    assert not np.any(np.any(jacobian(1) != 0, axis=(2, 3)) & ~expected)
    assert not np.any(np.any(jacobian(0) != 0, axis=(2, 3)) & ~np.eye(num_tokens, dtype=bool))


def test_memory_is_linear_in_the_sequence():
    def scratch_bytes(num_tokens, window_size):
        shape = jax.ShapeDtypeStruct((1, num_tokens, 1, 8), jnp.float32)

        def loss(*arrays):
            return sliding_window_attention(*arrays, window_size=window_size).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for window_size in (64, 10**9):
        short, long = (scratch_bytes(num_tokens, window_size) for num_tokens in (2048, 8192))
        assert long < 5 * short
        assert long < 8192 * 8192 * 4 / 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": np.zeros((2, 70, 4), np.float32)}),
        ("query", {"query": np.zeros((2, 70, 2, 4), np.int32)}),
        ("query", {"query": np.zeros((2, 0, 2, 4), np.float32)}),
        ("key", {"key": np.zeros((2, 69, 1, 4), np.float32)}),
        ("key", {"key": np.zeros((2, 70, 3, 4), np.float32)}),
        ("key", {"key": np.zeros((2, 70, 1, 4), np.float16)}),
        ("value", {"value": np.zeros((2, 70, 2, 4), np.float32)}),
        ("window_size", {"window_size": 0}),
        ("window_size", {"window_size": 2.0}),
        ("segment_ids", {"segment_ids": np.zeros((2, 71), np.int32)}),
        ("segment_ids", {"segment_ids": np.zeros((2, 70), np.float32)}),
    ],
)
def test_bad_arguments_are_named_S10(name, change):
    (query, key, value), _ = draw(0)
    arguments = {"query": query, "key": key, "value": value, "window_size": 4}
    with pytest.raises(ValueError, match=name):
        sliding_window_attention(**(arguments | change))
