"""PBS-Attn against its authors' order of keys, scores, choice and output."""

import functools

import jax
import numpy as np

from sparse_attn.grammar.attend import permute_keys
from sparse_attn.systems.pbs_attention import PBSAttention

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    assert arrays["causal"].item()  # theirs knows nothing else
    threshold = tuple(np.atleast_1d(arrays["threshold_f64"]).tolist())
    pbs = PBSAttention(
        threshold=threshold if len(threshold) > 1 else threshold[0],
        block_size=arrays["block_size"].item(),
        segment_size=arrays["segment_size"].item(),
        pool=(arrays["query_pool_mode"].item(), arrays["key_pool_mode"].item()),
        keep_first=arrays["force_select_first_block"].item(),
    )
    assert_close(jax.jit(pbs.sort_scores)(query, key), arrays["sort_score"])
    levels = jax.jit(pbs.select)(query, key)
    np.testing.assert_array_equal(levels.key_order, arrays["key_perm"])
    probability = jax.jit(pbs.scores)(query, permute_keys(key, levels.key_order))
    assert_close(probability, arrays["block_scores"])
    scored, own = arrays["scored_region"], arrays["segment_mask"]
    assert not np.asarray(probability)[..., ~scored].any()
    place = (np.asarray(levels.key_order) == 0).argmax(-1)[..., None, None]  # of the first token
    first = place // pbs.block_size == np.arange(scored.shape[1])
    np.testing.assert_array_equal(levels.to_mask(), arrays["block_mask"])
    np.testing.assert_array_equal(levels.to_mask() & own, np.broadcast_to(own, levels.levels.shape))
    selected = np.asarray(levels.to_mask()) & scored
    np.testing.assert_array_equal(selected, arrays["mask_selected"] & scored)
    if np.min(threshold) > 0:  # else theirs takes one of the own segment, of equal scores
        np.testing.assert_array_equal(selected | (pbs.keep_first & first & (scored | own)), arrays["mask_selected"])
    output = jax.jit(pbs)(query, key, value)
    assert_close(output.swapaxes(1, 2), arrays["output"])
