"""PSA against its authors' scores, levels, caps and attention, for the tokens that they drew."""

import functools

import jax
import numpy as np

from sparse_attn.grammar import describe, score
from sparse_attn.systems import psa

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    offsets = arrays["sample_idx_q"], arrays["sample_idx_k"]
    sizes = {"query_block_size": arrays["block_m"].item(), "key_block_size": arrays["block_n"].item()}
    ends = {int(level): end for level, _, end in arrays["mask_ratios_f64"].tolist()}
    bounds = np.maximum.accumulate([ends.get(level, 0.0) for level in (1, 2, 4, 8)])
    thresholds = arrays["sim_thresholds_2_4_8"].tolist()
    options = {
        **sizes,
        "rule": {"topk": "rank", "thresholdbound": "energy"}[arrays["mask_mode"].item()],
        "bounds": tuple(bounds.tolist()),
        "tile_size": arrays["tile_n"].item(),
        "least_exact_share": arrays["min_full_attn_ratio_f64"].item(),
        "similarity_thresholds": tuple(thresholds) if arrays["use_sim_mask"] else None,
    }

    @jax.jit
    def score_blocks(query, key, offsets):
        query = describe.sample_blocks(query, offsets[0], sizes["query_block_size"])
        key = describe.sample_blocks(key, offsets[1], sizes["key_block_size"])
        samples = {name: size // 4 for name, size in sizes.items()}
        return score.peaks(query, key, **samples, scale=query.shape[-1] ** -0.5)

    # The authors fill the samples up to a multiple of 64, and rows add up to 1 with what stands there.
    expected = arrays["block_scores"] / arrays["block_scores"].sum(-1, keepdims=True)
    assert_close(score_blocks(query, key, offsets), expected)

    published = {**options, "as_published": True}
    levels = jax.jit(functools.partial(psa.select, **published))(query, key, offsets)
    np.testing.assert_array_equal(levels.levels, arrays["level_map"])
    if "sim_cap" in arrays:
        filled = describe.fill_blocks(key, sizes["key_block_size"])
        cap = describe.poolable(filled, sizes["key_block_size"], thresholds)
        np.testing.assert_array_equal(cap.swapaxes(1, 2), arrays["sim_cap"])

    kernel = {"is_older_kernel": arrays["attn_impl"].item() == "old_mask_type"}
    output = jax.jit(functools.partial(psa.attention, **published, **kernel))(query, key, value, offsets)
    assert_close(output.swapaxes(1, 2), arrays["output"])
    if key.shape[1] % sizes["key_block_size"] == 0:
        output = jax.jit(functools.partial(psa.attention, **options))(query, key, value, offsets)
        assert_close(output.swapaxes(1, 2), arrays.get("output_formula", arrays["output"]))
