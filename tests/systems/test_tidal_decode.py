"""TidalDecode against a NumPy walk through the layers in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.tidal_decode import TidalDecode
from tests import near_ties, oracle
from tests.cases import assert_close

ATTENTION = TidalDecode(top_k=5, first_selecting_layer=1, correction_layer=3)


def draw(dtype=np.float32, seed=0):
    """Five layers of one decoding step, 17 keys; exact logits."""
    random = np.random.default_rng(seed)
    query = near_ties.eighths(random.standard_normal((5, 2, 1, 4, 8))).astype(dtype)
    return query, *near_ties.eighths(random.standard_normal((2, 5, 2, 17, 2, 8))).astype(dtype)


@functools.cache
def layer(number):
    return jax.jit(functools.partial(ATTENTION, layer=number))


def walk(query, key, value):
    """Outputs and masks of all layers."""
    selection, outputs, masks = None, [], []
    for number in range(5):
        output, selection = layer(number)(query[number], key[number], value[number], selection)
        outputs.append(output)
        masks.append(None if selection is None else selection.to_mask())
    return outputs, masks


def test_layers_equal_loops(strict_ranks):
    query, key, value = draw()
    outputs, masks = walk(query, key, value)
    assert masks[0] is None
    everything = listed = np.ones((2, 4, 1, 17), bool)
    for number in range(5):
        if number in (1, 3):
            listed = np.zeros_like(everything)
            for b, h in np.ndindex(2, 4):
                logits = key[number, b, :, h // 2].astype(np.float64) @ query[number, b, 0, h]
                listed[b, h, 0, np.argsort(-logits, kind="stable")[:5]] = True
        mask = listed if number in (2, 4) else everything
        assert_close(outputs[number], oracle.attention(query[number], key[number], value[number], mask), "float32")
        if number:
            np.testing.assert_array_equal(masks[number], listed)


def test_dtype_and_rows():
    query, key, value = (array[0] for array in draw(jnp.bfloat16))
    selection = jax.jit(ATTENTION.select)(query, key)
    for number, mask in ((0, np.ones((2, 4, 1, 17), bool)), (2, np.asarray(selection.to_mask()))):
        output, _ = layer(number)(query, key, value, selection)
        assert output.dtype == jnp.bfloat16
        assert_close(output, oracle.attention(query, key, value, mask), "bfloat16")
        without = [np.where(np.arange(2).reshape(2, 1, 1, 1) == 0, np.nan, array) for array in (query, key, value)]
        again, _ = layer(number)(*(array.astype(jnp.bfloat16) for array in without), selection)
        np.testing.assert_array_equal(again[1], output[1])


def test_ties_go_to_the_earlier_key_and_short_caches_are_read_whole():
    query = np.ones((1, 1, 1, 1), np.float32)
    key = np.array([-0.0, 2, 3, 0, 2], np.float32).reshape(1, 5, 1, 1)  # -0 and 0 are a tie too
    assert TidalDecode(top_k=4).select(query, key).indices.tolist() == [[[[2, 1, 4, 0]]]]
    assert TidalDecode(top_k=7).select(query, key).indices.tolist() == [[[[2, 1, 4, 0, 3, -1, -1]]]]


def test_bad_arguments_are_named():
    query, key, value = (array[0] for array in draw())
    with pytest.raises(ValueError, match="selection must be"):
        TidalDecode()(query, key, value, None, layer=5)
    for number in (0, 2):
        with pytest.raises(ValueError, match="query must be one token"):
            TidalDecode()(query.repeat(2, 1), key, value, None, layer=number)
    with pytest.raises(ValueError, match="query must be one token"):
        TidalDecode().select(query.repeat(2, 1), key)
    with pytest.raises(ValueError, match="top_k"):
        TidalDecode(top_k=0)
    with pytest.raises(ValueError, match="key_value_seq_lengths"):
        TidalDecode()(query, key, value, None, layer=0, seq_lengths=np.array([1, 1]))
