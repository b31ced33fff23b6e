"""Rectified SpaAttn against its authors' pooled attention, choice, correction and output, with text and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.grammar import describe, score
from sparse_attn.selection import LevelMap
from sparse_attn.systems import rectified
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    block_size, text_length = arrays["block_size"].item(), arrays["text_length"].item()
    num_video = query.shape[1] - text_length
    options = {
        "block_size": block_size,
        "threshold": arrays["prob_threshold_f64"].item(),
        "top_k": arrays["top_k"].item(),
        "text_length": text_length,
        "as_published": True,
    }
    scale = query.shape[3] ** -0.5

    filled = [describe.fill_blocks(array[:, :num_video], block_size, "constant") for array in (query, key, value)]
    query_mean, key_mean = (describe.block_mean(array, block_size) for array in filled[:2])
    pooled = jnp.concatenate([key_mean, key[:, num_video:]], axis=1)
    assert_close(query_mean.swapaxes(1, 2), arrays["q_mean"])
    assert_close(pooled.swapaxes(1, 2), arrays["k_pool"])
    assert_close(score.dot(query_mean, pooled), arrays["scores_raw"])
    shared = {name: options[name] for name in ("block_size", "text_length", "as_published")}
    probability, has_gain = jax.jit(functools.partial(rectified.weigh, scale=scale, **shared))(query, key)
    assert_close(probability[..., : arrays["probs"].shape[-1]], arrays["probs"])
    np.testing.assert_array_equal(has_gain, ~arrays["not_compensated"])

    forced = arrays["block_neighbor"].copy()
    first_frame = max(0, arrays["first_frame_blocks"].item())
    forced[:first_frame, :first_frame] = True
    levels = jax.jit(functools.partial(rectified.select, **options))(query, key, forced=forced)
    mask = arrays["block_mask"]
    np.testing.assert_array_equal(levels.to_mask(), mask[..., : has_gain.shape[-1]])
    assert mask[..., has_gain.shape[-1] :].all()  # text
    np.testing.assert_array_equal(levels.levels == 2, ~levels.to_mask() & ~arrays["not_compensated"])

    factor, compensation = jax.jit(rectified.rectify)(probability, levels, filled[2])
    assert_close(factor[..., 0].swapaxes(1, 2), arrays["rectify_factor"])
    assert_close(compensation.swapaxes(1, 2), arrays["compensation"])
    # Text is whole blocks in these files: all of it is one more set of blocks that every query attends.
    kept, video = LevelMap(jnp.asarray(mask, jnp.int8), block_size, block_size), query[:, :num_video]
    visibility = make_visibility(video, key, is_causal=False)
    sparse = jax.jit(functools.partial(attend_tiles, scale=scale))(video, key, value, kept, visibility)
    assert_close(sparse.output().swapaxes(1, 2), arrays["sparse_output"][:, :, :num_video])
    output = jax.jit(functools.partial(rectified.attention, **options))(query, key, value, forced=forced)
    assert_close(output.swapaxes(1, 2), arrays["output"])
    if num_video % block_size == 0:
        options["as_published"] = False
        output = jax.jit(functools.partial(rectified.attention, **options))(query, key, value, forced=forced)
        assert_close(output.swapaxes(1, 2), arrays["output"])
