"""The base of the systems: packed and padded rows, and the checks of values. Equality is tested in test_recipes.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.prism import Prism
from sparse_attn.systems.system import by_sequence, per_head
from tests.cases import assert_close

PRISM = Prism(high_size=4, low_size=6, high_threshold=0.5, low_threshold=0.6, block_size=3)
TOKENS = 17
IDS = np.array(
    [[5] * 6 + [2] * 11, [1] * 4 + [0] * 6 + [1] * 2 + [3] * 5]
)  # the second row's segment 1 is in two parts
LENGTHS = np.array([99, 12])  # of the second row's segment 3 nothing is left
SEQUENCES = [(0, [*range(6)]), (0, [*range(6, 17)]), (1, [*range(4), 10, 11]), (1, [*range(4, 10)])]


def draw():
    """Peaked enough that choices are sparse; NaN in the padding."""
    random = np.random.default_rng(0)
    query = 2 * random.standard_normal((2, TOKENS, 4, 8)).astype(np.float32)
    key, value = random.standard_normal((2, 2, TOKENS, 2, 8)).astype(np.float32)
    for array in (query, key, value):
        array[1, 12:] = np.nan
    return query, key, value


def test_packed_and_padded_rows_equal_each_sequence_alone():
    arrays = draw()
    output = jax.jit(lambda *x: PRISM(*x, segment_ids=IDS, seq_lengths=LENGTHS))(*arrays)
    alone = jax.jit(lambda *x: (PRISM(*x), PRISM.select(*x[:2]).density()))
    for row, places in SEQUENCES:
        expected, density = alone(*(array[row : row + 1, places] for array in arrays))
        assert len(places) < 9 or density.max() < 0.7  # something is dropped
        assert_close(output[row : row + 1, np.array(places)], expected, "float32")
    np.testing.assert_array_equal(output[1, 12:], 0)


def test_nan_in_padding_reaches_no_gradient():
    array = np.ones((2, TOKENS, 1, 1), np.float32)
    array[1, 12:] = np.nan
    pull_back = jax.jit(jax.grad(lambda x: by_sequence(lambda _, x: jnp.cumsum(x * x, 1), (x,), None, LENGTHS).sum()))
    gradient = pull_back(array)
    np.testing.assert_array_equal(gradient[0, :, 0, 0], 2.0 * np.arange(17, 0, -1))
    np.testing.assert_array_equal(gradient[1, :, 0, 0], [*(2.0 * np.arange(12, 0, -1)), *5 * [0]])


def test_the_call_gets_the_row_and_the_tokens_of_every_sequence():
    array = np.arange(2 * TOKENS, dtype=np.float32).reshape(2, TOKENS, 1, 1)
    weight = np.array([1.0, 10.0], np.float32)

    def run(**rows):
        sums = by_sequence(lambda row, x: weight[row, None, None, None] * jnp.cumsum(x, 1), (array,), **rows)
        return np.asarray(sums)[..., 0, 0]

    for sequences, rows in (
        (SEQUENCES, {"segment_ids": IDS, "seq_lengths": LENGTHS}),
        ([*SEQUENCES, (1, [*range(12, 17)])], {"segment_ids": jnp.asarray(IDS), "seq_lengths": None}),
        ([(0, [*range(17)]), (1, [*range(12)])], {"segment_ids": None, "seq_lengths": LENGTHS.tolist()}),
        ([(1, [*range(3)])], {"segment_ids": None, "seq_lengths": np.array([-1, 3])}),
        ([], {"segment_ids": IDS, "seq_lengths": np.array([0, 0])}),
    ):
        expected = np.zeros((2, TOKENS))
        for row, places in sequences:
            expected[row, places] = weight[row] * np.cumsum(array[row, places])
        np.testing.assert_array_equal(run(**rows), expected)


def test_rows_that_cannot_be_cut_are_named():
    query, key, value = draw()
    for name, rows in {"segment_ids": IDS, "seq_lengths": LENGTHS}.items():
        with pytest.raises(ValueError, match=f"{name} must be known when the call is traced"):
            jax.jit(lambda rows, name=name: PRISM(query, key, value, **{name: rows}))(rows)
        with pytest.raises(ValueError, match=f"{name} must be integers of shape"):
            PRISM(query, key, value, **{name: rows[:1]})
        with pytest.raises(ValueError, match=f"{name} must be integers of shape"):
            PRISM(query, key, value, **{name: rows + 0.5})
        with pytest.raises(ValueError, match="those of self-attention"):
            PRISM(query[:, 3:], key, value, **{name: rows[:, 3:] if rows.ndim == 2 else rows})


def test_values_and_arrays_are_checked():
    query, key, value = draw()
    for options in ({"scale": np.inf}, {"scale": "1"}, {"block_size": 0}, {"high_size": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Prism(**options)
    for name, call in {
        "low_size must be at most head_dim=8": lambda: Prism(high_size=4)(query, key, value),
        "key must be longer": lambda: PRISM.select(query, key[:, 3:]),
        "key must have query's dtype": lambda: PRISM.select(query, key.astype(np.float16)),
        "value must be shaped like key": lambda: PRISM(query, key, value[:, 3:]),
        "query must be": lambda: PRISM(query[0], key, value),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(ValueError, match="one for each of 3 heads"):
        per_head((0.5, 0.9), 3)
    np.testing.assert_array_equal(per_head((0.5, 0.25), 2), np.array([0.5, 0.25])[:, None, None])
    assert per_head(0.5, 3).shape == (1, 1, 1)
