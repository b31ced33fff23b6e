"""Rectified SpaAttn against its authors' pooled attention, choice, correction and output, with text and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.grammar import describe, score
from sparse_attn.selection import LevelMap
from sparse_attn.systems.rectified import RectifiedSpaAttn

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(RectifiedSpaAttn):
    """With the authors' error: zeros behind a short last block count as tokens of it."""

    def _video(self, array):
        array = super()._video(array)
        return jnp.pad(array, ((0, 0), (0, -array.shape[1] % self.block_size), (0, 0), (0, 0)))


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    block_size, text_length = arrays["block_size"].item(), arrays["text_length"].item()
    num_video = query.shape[1] - text_length
    options = {
        "block_size": block_size,
        "threshold": arrays["prob_threshold_f64"].item(),
        "top_k": arrays["top_k"].item(),
        "text_length": text_length,
    }
    published = Published(**options)

    filled = [published._video(array) for array in (query, key)]
    query_mean, key_mean = (describe.block_mean(array, block_size) for array in filled)
    pooled = jnp.concatenate([key_mean, key[:, num_video:]], axis=1)
    assert_close(query_mean.swapaxes(1, 2), arrays["q_mean"])
    assert_close(pooled.swapaxes(1, 2), arrays["k_pool"])
    assert_close(score.dot(query_mean, pooled), arrays["scores_raw"])
    probability, has_gain = jax.jit(published.weigh)(query, key)
    assert_close(probability[..., : arrays["probs"].shape[-1]], arrays["probs"])
    np.testing.assert_array_equal(has_gain, ~arrays["not_compensated"])

    forced = arrays["block_neighbor"].copy()
    first_frame = max(0, arrays["first_frame_blocks"].item())
    forced[:first_frame, :first_frame] = True
    levels = jax.jit(published.select)(query, key, forced=forced)
    mask = arrays["block_mask"]
    np.testing.assert_array_equal(levels.to_mask(), mask[..., : has_gain.shape[-1]])
    assert mask[..., has_gain.shape[-1] :].all()  # text
    np.testing.assert_array_equal(levels.levels == 2, ~levels.to_mask() & ~arrays["not_compensated"])

    factor, compensation = jax.jit(published.rectify)(probability, levels, value)
    assert_close(factor[..., 0].swapaxes(1, 2), arrays["rectify_factor"])
    assert_close(compensation.swapaxes(1, 2), arrays["compensation"])
    # Text is whole blocks in these files: all of it is one more set of blocks that every query attends.
    kept = LevelMap(jnp.asarray(mask, jnp.int8), block_size, block_size)
    sparse = jax.jit(published._attend)(query[:, :num_video], key, value, kept)
    assert_close(sparse.output().swapaxes(1, 2), arrays["sparse_output"][:, :, :num_video])
    output = jax.jit(published)(query, key, value, forced=forced)
    assert_close(output.swapaxes(1, 2), arrays["output"])
    if num_video % block_size == 0:
        output = jax.jit(RectifiedSpaAttn(**options))(query, key, value, forced=forced)
        assert_close(output.swapaxes(1, 2), arrays["output"])
