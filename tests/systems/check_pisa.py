"""PISA against its authors' block summaries, scores, choice and attention."""

import functools

import jax
import numpy as np

from sparse_attn.grammar.describe import block_lengths, block_mean
from sparse_attn.systems import pisa

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    size = {"block_size": arrays["block_size"].item()}
    options = {**size, "use_moment_norm": arrays["use_bias"].item(), "scale": arrays["scale_f64"].item()}
    density = {"density": arrays["density_f64"].item()}

    key_mean, value_mean, moments = jax.jit(functools.partial(pisa.describe, **size))(key, value)
    lengths = np.asarray(block_lengths(key.shape[1], size["block_size"]))[:, None, None]
    assert_close(block_mean(query, size["block_size"]).swapaxes(1, 2), arrays["q_mean"])
    assert_close(key_mean.swapaxes(1, 2), arrays["k_mean"])
    assert_close((value_mean * lengths).swapaxes(1, 2), arrays["v_sum"])
    assert_close(moments.sum(1), arrays["h_total"])
    if "h_norm" in arrays:
        assert_close(np.linalg.norm(moments, axis=(-2, -1)).swapaxes(1, 2), arrays["h_norm"])
    scores = jax.jit(functools.partial(pisa.score_blocks, **options))(query, key_mean, moments)
    assert_close(scores, arrays["block_scores"])

    levels = jax.jit(functools.partial(pisa.select, **options, **density))(query, key, value)
    mask = np.asarray(levels.to_mask())
    np.testing.assert_array_equal(mask, arrays["block_mask"])
    assert (mask.sum(-1) == arrays["top_k"]).all()
    np.testing.assert_array_equal(np.sort(arrays["indices"]), np.nonzero(mask)[-1].reshape(arrays["indices"].shape))

    attention = functools.partial(pisa.attention, **options, **density)
    output = jax.jit(attention)(query, key, value).swapaxes(1, 2)
    assert_close(output, arrays.get("output_rescaled_formula", arrays["output"]))
    published = jax.jit(functools.partial(attention, tail_group_size=arrays["group_size"].item()))(query, key, value)
    assert_close(published.swapaxes(1, 2), arrays["output"])
    if arrays["tail_mass_defect_visible"]:
        assert np.abs(output - arrays["output"]).max() > 1e-3
