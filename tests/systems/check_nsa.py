"""NSA against the weights, choices and outputs of fla's reference."""

import functools

import jax
import numpy as np

from sparse_attn.grammar.describe import block_lengths, block_mean
from sparse_attn.systems.nsa import NSA, compressed_weights

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name] for name in "qkv")
    num_tokens, kv_heads = query.shape[1], key.shape[2]
    assert kv_heads == arrays["n_kv_heads"].item()
    block_size, scale = arrays["block_size"].item(), arrays["scale_f64"].item()
    position = np.arange(num_tokens, dtype=np.int32)

    means = jax.jit(functools.partial(block_mean, block_size=block_size))(key)
    share = np.asarray(block_lengths(num_tokens, block_size)) / block_size  # theirs counts padding
    assert_close(np.asarray(means) * share[:, None, None], arrays["k_cmp"])
    weigh = jax.jit(functools.partial(compressed_weights, scale=scale))
    weights = np.array(weigh(query, means, np.zeros((1, num_tokens), int), (position[None] + 1) // block_size))
    assert_close(weights, arrays["attn_cmp"])
    weights[:, :, position, position // block_size] = 1  # theirs forces the own block before it adds up
    added = weights.reshape(len(query), kv_heads, -1, *weights.shape[2:]).sum(2)
    assert_close(added, arrays["group_score"])

    sizes = {"block_size": block_size, "top_k": arrays["n_selected"].item()}
    attention = NSA(**sizes, window_size=arrays["window_size"].item(), scale=scale)
    selection = jax.jit(attention.select)(query, key)
    group = query.shape[2] // kv_heads
    np.testing.assert_array_equal(selection.to_mask(), arrays["block_mask"].repeat(group, 1))
    published = arrays["block_indices"].swapaxes(1, 2).repeat(group, 1)  # in no order
    missing = sizes["top_k"] - published.shape[-1]
    published = np.pad(published, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)
    np.testing.assert_array_equal(np.sort(selection.indices), np.sort(published))

    attend = jax.jit(attention)
    gates = np.stack([arrays["g_cmp"], arrays["g_slc"], arrays["g_swa"]], axis=-1)
    for expected, used in (
        ("output", gates),
        ("o_cmp_gated", gates * np.array([1, 0, 0], np.float32)),
        ("o_slc_ungated", np.broadcast_to(np.array([0, 1, 0], np.float32), gates.shape)),
    ):
        assert_close(attend(query, key, value, used), arrays[expected])
