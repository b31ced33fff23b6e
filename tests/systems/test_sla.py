"""SLA against loops and dense sums in float64: classes of blocks, both parts, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.sla import SLA, linear_attention
from tests import near_ties, oracle
from tests.cases import assert_close

SIZES = {"query_block_size": 8, "key_block_size": 4}
CASES = [  # options, critical and negligible blocks out of 10
    ({"density": 0.3, "feature_map": "relu"}, 3, 0),
    ({"density": 0.1, "linear_keys": "marginal", "feature_map": "elu"}, 1, 0),
    ({"density": 0.25, "linear_keys": "marginal", "negligible": 0.35}, 2, 3),
]


def draw(dtype=np.float32, tokens=37, seed=0):
    """Query, key, value, projection, bias and a cotangent: two rows, two key/value heads of two query heads each."""
    random = np.random.default_rng(seed)
    query, d_output = random.standard_normal((2, 2, tokens, 4, 4)).astype(dtype)
    key, value = random.standard_normal((2, 2, tokens, 2, 4)).astype(dtype)
    projection, bias = random.standard_normal((4, 4)).astype(dtype), random.standard_normal(4).astype(dtype)
    return query, key, value, projection, bias, d_output


def classify(query, key, critical, negligible):
    """Levels by loops, int [batch, heads, query_blocks, key_blocks], by plain means as in the paper; decided rows."""
    query, key = query.astype(np.float64), key.astype(np.float64)
    tokens, group = query.shape[1], query.shape[2] // key.shape[2]
    levels = np.full((*query.shape[:3:2], -(-tokens // 8), -(-tokens // 4)), 2)
    decided = np.zeros(levels.shape[:3], bool)
    for b, h, i in np.ndindex(*levels.shape[:3]):
        rows, keys = query[b, 8 * i : 8 * i + 8, h], key[b, :, h // group]
        means = np.array([keys[4 * j : 4 * j + 4].mean(0) for j in range(levels.shape[3])])
        scores = means @ rows.mean(0)
        ranking = np.argsort(-scores)
        levels[b, h, i, ranking[levels.shape[3] - negligible :]] = 0
        levels[b, h, i, ranking[:critical]] = 1
        # The library centres keys: rounded are means over all keys and both blocks, a difference, and the product.
        size = np.abs(keys).mean(0) + [np.abs(keys[4 * j : 4 * j + 4]).mean(0) for j in range(levels.shape[3])]
        roundings = tokens + 8 + 4 + 4 + query.shape[3]
        error = near_ties.dot_error(rows.mean(0), means, size @ np.abs(rows).mean(0), roundings)
        cuts = (near_ties.is_decided(scores, error, kept) for kept in (levels[b, h, i] == 1, levels[b, h, i] > 0))
        decided[b, h, i] = all(cuts)
    return levels, near_ties.most(decided)


def define(query, key, value, projection, bias, levels, options):
    """The output by dense weights, float64 [batch, tokens, heads, d]."""
    query, key, value, projection, bias = (np.asarray(x, np.float64) for x in (query, key, value, projection, bias))
    tokens, group = query.shape[1], query.shape[2] // key.shape[2]
    level = levels.repeat(8, 2).repeat(4, 3)[:, :, :tokens, :tokens]
    key, value = key.repeat(group, 2), value.repeat(group, 2)
    weight = np.exp(0.5 * np.einsum("bthd,bshd->bhts", query, key)) * (level == 1)
    sparse = np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), value)
    features = {
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
        "relu": lambda x: np.maximum(x, 0),
    }[options.get("feature_map", "softmax")]
    weight = np.einsum("bthd,bshd->bhts", features(query), features(key))
    is_all = options.get("linear_keys", "all") == "all"
    weight = weight * (is_all | (level == 2))
    total = weight.sum(-1, keepdims=True) + (1e-5 if is_all else 0)
    weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return sparse + np.einsum("bhts,bshd->bthd", weight, value) @ projection + bias


@pytest.mark.parametrize(("options", "critical", "negligible"), CASES, ids=str)
def test_classes_output_and_gradients_equal_dense_sums(options, critical, negligible, strict_ranks):
    *arrays, d_output = draw()
    levels, decided = classify(*arrays[:2], critical, negligible)
    rows = decided.repeat(8, 2)[:, :, :37].swapaxes(1, 2)  # [batch, tokens, heads]
    d_output = np.where(rows[..., None], d_output, 0)
    sla = SLA(**SIZES, **options)

    @jax.jit
    def run(*arrays):
        levels = sla.select(*arrays[:2]).levels
        output, pull_back = jax.vjp(sla, *arrays)
        return levels, output, pull_back(d_output)

    actual, output, gradients = run(*arrays)
    np.testing.assert_array_equal(actual[decided], levels[decided])
    assert_close(output, define(*arrays, levels, options), "float32", rows)

    def loss(*arrays):
        return (define(*arrays, levels, options) * d_output).sum()

    random, doubles = np.random.default_rng(1), [array.astype(np.float64) for array in arrays]
    for place, gradient in enumerate(gradients):
        direction = [np.zeros(array.shape) for array in arrays]
        direction[place] = random.standard_normal(gradient.shape)
        assert_close((gradient * direction[place]).sum(), oracle.slope(loss, doubles, direction), "float32")


def test_no_marginal_block_and_no_common_feature_give_no_linear_part():
    query, key, value, projection, bias, _ = draw(tokens=8)
    everything = SLA(**SIZES, linear_keys="marginal", density=1.0)
    output = jax.jit(everything)(query, key, value, projection, 0 * bias)
    assert_close(output, jax.nn.dot_product_attention(query, key, value), "float32")
    linear = jax.jit(functools.partial(linear_attention, feature_map="relu"))
    np.testing.assert_array_equal(linear(abs(query), -abs(key), value, None), 0)


def test_dtype_and_rows():
    arrays = draw(jnp.bfloat16)[:5]
    attend = jax.jit(SLA(**SIZES, density=0.3, linear_keys="marginal"))
    output = attend(*arrays)
    assert output.dtype == jnp.bfloat16
    levels, decided = classify(*arrays[:2], 3, 0)
    rows = decided.repeat(8, 2)[:, :, :37].swapaxes(1, 2)
    assert_close(output, define(*arrays, levels, {"linear_keys": "marginal"}), "bfloat16", rows)
    for array in arrays[:3]:
        array[0] = np.nan
    np.testing.assert_array_equal(attend(*arrays)[1], output[1])


def test_bad_arguments_are_named():
    query, key, value, projection, bias, _ = draw()
    for options, name in (
        ({"density": 1.5}, "density must be"),
        ({"negligible": -0.1, "linear_keys": "marginal"}, "negligible must be"),
        ({"negligible": 0.1}, "negligible must be 0"),
        ({"linear_keys": "some"}, "linear_keys must be"),
        ({"feature_map": "exp"}, "feature_map must be"),
        ({"query_block_size": 0}, "query_block_size"),
        ({"key_block_size": 0}, "key_block_size"),
    ):
        with pytest.raises(ValueError, match=name):
            SLA(**options)
    sla = SLA()
    with pytest.raises(ValueError, match="projection must have"):
        sla(query, key, value, projection[1:], bias)
    with pytest.raises(ValueError, match="bias must have"):
        sla(query, key, value, projection, bias[1:])
    with pytest.raises(ValueError, match="as many tokens"):
        sla(query, key[:, 1:], value[:, 1:], projection, bias)
