"""The key convolution against NumPy loops."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.keys import causal_key_convolution
from tests import cases

pytestmark = pytest.mark.usefixtures("strict_ranks")


def convolve(key, kernel, segment_ids=None):
    """The definition, token by token in float64."""
    key, kernel = np.asarray(key, np.float64), np.asarray(kernel, np.float64)
    output = np.empty_like(key)
    for row, token in np.ndindex(key.shape[:2]):
        mixture = np.zeros(key.shape[2:])
        for lag in range(min(len(kernel), token + 1)):
            if segment_ids is None or segment_ids[row, token] == segment_ids[row, token - lag]:
                mixture += kernel[lag] * key[row, token - lag]
        output[row, token] = key[row, token] + mixture / (1 + np.exp(-mixture))
    return output


def draw(seed, batch=2, num_tokens=11, heads=2, head_dim=3, width=3, dtype="float32"):
    random = np.random.default_rng(seed)
    key = random.standard_normal((batch, num_tokens, heads, head_dim)).astype(cases.as_dtype(dtype))
    kernel = random.standard_normal((width, heads, head_dim)).astype(np.float32)
    segment_ids = np.sort(random.integers(-1, 3, (batch, num_tokens))).astype(np.int32)
    return key, kernel, segment_ids


@hypothesis.given(
    seed=st.integers(0, 99),
    num_tokens=st.sampled_from([1, 2, 4, 11]),
    width=st.sampled_from([1, 3, 5]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    is_packed=st.booleans(),
)
def test_convolution_equals_its_definition(seed, num_tokens, width, dtype, is_packed):
    key, kernel, segment_ids = draw(seed, num_tokens=num_tokens, width=width, dtype=dtype)
    segment_ids = segment_ids if is_packed else None
    output = causal_key_convolution(jnp.asarray(key), kernel, segment_ids)
    assert output.dtype == key.dtype
    cases.assert_close(output, convolve(key, kernel, segment_ids), dtype)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_convolution_is_the_same_jitted(self):
        key, kernel, segment_ids = draw(0)
        output = self.variant(causal_key_convolution)(key, kernel, segment_ids)
        cases.assert_close(output, convolve(key, kernel, segment_ids), "float32")


def test_a_packed_row_is_its_segments_one_by_one():
    key, kernel, _ = draw(0, batch=1, num_tokens=9, width=5)
    ids = np.array([[4] * 3 + [0] * 6], np.int32)
    packed = causal_key_convolution(key, kernel, ids)
    apart = [causal_key_convolution(part, kernel) for part in (key[:, :3], key[:, 3:])]
    np.testing.assert_array_equal(packed, np.concatenate(apart, axis=1))


def test_a_key_depends_on_nothing_later_and_on_no_other_segment():
    key, kernel, _ = draw(1, batch=1, num_tokens=8, width=5)
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1]], np.int32)

    def token(key, place):
        return causal_key_convolution(key, kernel, ids)[0, place].sum()

    depends = np.stack([np.any(jax.grad(token)(jnp.asarray(key), place) != 0, axis=(0, 2, 3)) for place in range(8)])
    expected = np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -5) & (ids == ids.T)
    np.testing.assert_array_equal(depends, expected)


def test_gradients_match_differences():
    key, kernel, segment_ids = draw(2, num_tokens=6)
    chex.assert_numerical_grads(
        lambda key, kernel: causal_key_convolution(key, kernel, segment_ids), (key, kernel), order=1, atol=2e-2
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", {"key": np.zeros((2, 11, 6), np.float32)}),
        ("key", {"key": np.zeros((2, 11, 2, 3), np.int32)}),
        ("kernel", {"kernel": np.zeros((3, 1, 3), np.float32)}),
        ("kernel", {"kernel": np.zeros((0, 2, 3), np.float32)}),
        ("kernel", {"kernel": np.zeros((3, 2, 3), np.int32)}),
        ("segment_ids", {"segment_ids": np.zeros((2, 10), np.int32)}),
        ("segment_ids", {"segment_ids": np.zeros((2, 11), np.float32)}),
    ],
)
def test_bad_arguments_are_named_S10(name, change):
    key, kernel, segment_ids = draw(0)
    with pytest.raises(ValueError, match=name):
        causal_key_convolution(**({"key": key, "kernel": kernel, "segment_ids": segment_ids} | change))
