"""SLA against its authors' scores, choice, both parts and both branches' outputs."""

import dataclasses
import functools

import jax
import numpy as np

from sparse_attn.grammar.describe import block_mean
from sparse_attn.systems.sla import SLA, linear_attention, score_blocks

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    sizes = {"query_block_size": arrays["block_q"].item(), "key_block_size": arrays["block_k"].item()}
    density = {"density": min(1.0, arrays["topk_ratio_f64"].item())}  # theirs takes at most all
    sparse_part, expected = arrays["o_sparse"], arrays["output_main"]
    if arrays["topk"] == 0:  # theirs divides zero by zero
        sparse_part = np.zeros_like(sparse_part)
        expected = arrays["o_linear_all_keys"] @ arrays["proj_weight"].T + arrays["proj_bias"]
    features = {"feature_map": arrays["feature_map"].item()}
    sla = SLA(**sizes, **density, **features)
    assert_close(block_mean(query, sizes["query_block_size"]).swapaxes(1, 2), arrays["pooled_q"])
    centred = key - key.mean(1, keepdims=True)
    assert_close(block_mean(centred, sizes["key_block_size"]).swapaxes(1, 2), arrays["pooled_k_centred"])
    assert_close(jax.jit(functools.partial(score_blocks, **sizes))(query, key), arrays["block_scores"])

    levels = jax.jit(sla.select)(query, key)
    np.testing.assert_array_equal(levels.to_mask(), arrays["block_mask"])
    assert (np.asarray(levels.to_mask()).sum(-1) == arrays["topk"]).all()

    linear = jax.jit(functools.partial(linear_attention, **features))
    assert_close(linear(query, key, value, None).swapaxes(1, 2), arrays["o_linear_all_keys"])
    assert_close(linear(query, key, value, levels).swapaxes(1, 2), arrays["o_linear_unselected"])

    projection, bias = arrays["proj_weight"].T, arrays["proj_bias"]
    attention = jax.jit(sla)
    sparse = attention(query, key, value, np.zeros_like(projection), np.zeros_like(bias))
    assert_close(sparse.swapaxes(1, 2), sparse_part)
    assert_close(attention(query, key, value, projection, bias).swapaxes(1, 2), expected)
    output = jax.jit(dataclasses.replace(sla, linear_keys="marginal"))(query, key, value, projection, bias)
    expected = sparse_part + arrays["o_linear_unselected"] @ projection + bias
    assert_close(output.swapaxes(1, 2), expected)
