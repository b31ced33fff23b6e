"""PBS-Attn against its authors' order of keys, scores, choice and output."""

import functools

import jax
import numpy as np

from sparse_attn.systems import pbs_attention

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    pool = arrays["query_pool_mode"].item(), arrays["key_pool_mode"].item()
    assert arrays["causal"].item()  # theirs knows nothing else
    sizes = {"block_size": arrays["block_size"].item(), "segment_size": arrays["segment_size"].item()}
    scaled = {**sizes, "scale": query.shape[-1] ** -0.5}

    scores = jax.jit(functools.partial(pbs_attention.sort_scores, **scaled))(query, key)
    assert_close(scores, arrays["sort_score"])
    threshold = tuple(np.atleast_1d(arrays["threshold_f64"]).tolist())
    threshold = threshold if len(threshold) > 1 else threshold[0]
    keep_first = arrays["force_select_first_block"].item()
    options = {**sizes, "threshold": threshold, "pool": pool, "keep_first": keep_first}
    levels, order = jax.jit(functools.partial(pbs_attention.select, **options))(query, key)
    np.testing.assert_array_equal(order, arrays["key_perm"])
    permuted = pbs_attention.permute_keys(key, order)
    probability = jax.jit(functools.partial(pbs_attention.score_blocks, **scaled, pool=pool))(query, permuted)
    assert_close(probability, arrays["block_scores"])
    scored, own = arrays["scored_region"], arrays["segment_mask"]
    assert not np.asarray(probability)[..., ~scored].any()
    first = (np.asarray(order) == 0).argmax(-1)[..., None, None] // sizes["block_size"] == np.arange(scored.shape[1])
    np.testing.assert_array_equal(levels.to_mask(), arrays["block_mask"])
    np.testing.assert_array_equal(levels.to_mask() & own, np.broadcast_to(own, levels.levels.shape))
    selected = np.asarray(levels.to_mask()) & scored
    np.testing.assert_array_equal(selected, arrays["mask_selected"] & scored)
    if np.min(threshold) > 0:  # else theirs takes one of the own segment, of equal scores
        np.testing.assert_array_equal(selected | (keep_first & first & (scored | own)), arrays["mask_selected"])
    output = jax.jit(functools.partial(pbs_attention.attention, **options))(query, key, value)
    assert_close(output.swapaxes(1, 2), arrays["output"])
