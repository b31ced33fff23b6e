"""PSA against its authors' scores, levels, caps and attention, for the tokens that they drew."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.grammar import describe, rest
from sparse_attn.systems.psa import PSA

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def fill_blocks(array, block_size):
    """`[batch, tokens, heads, head_dim]` up to a whole block with copies of the last token."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % block_size), (0, 0), (0, 0)), mode="edge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(PSA):
    """With the authors' errors: copies of the last token count in caps and means, and tiles are filled with strays.

    Attributes:
      is_older_kernel: with the errors of their older kernel, which fills no tiles.
    """

    is_older_kernel: bool = False

    def _cap(self, key, thresholds):
        return super()._cap(fill_blocks(key, self.key_block_size), thresholds)

    def _means(self, query, key, value, levels, level):
        key, value = (fill_blocks(array, self.key_block_size) for array in (key, value))
        means = super()._means(query, key, value, levels, level)
        if self.is_older_kernel or 2 * self.key_block_size >= level * self.tile_size:
            return means
        return merge(means, self._strays(query, key, value, levels, level))

    def _strays(self, query, key, value, levels, level):
        """What is read besides two blocks of a level that do not fill a tile: the row's means at its places."""
        strays = slice(2 * self.key_block_size, level * self.tile_size)
        key, value = (describe.block_mean(array[:, strays], level) for array in (key, value))
        pairs = (levels.levels == level).sum(-1, keepdims=True) // 2  # [batch, heads, query_blocks, 1]
        is_used = jnp.broadcast_to(pairs > 0, (*pairs.shape[:3], key.shape[1]))
        log_count, size = jnp.full((1, 1), math.log(level)), self.query_block_size
        options = {"query_block_size": size, "scale": self.factor(query)}
        part = rest.pooled(query, key, value, log_count, is_used, **options)
        times = pairs.repeat(size, axis=2)[:, :, : query.shape[1]].swapaxes(1, 2)  # [batch, queries, heads, 1]
        return Partial(part.maximum, times[..., 0] * part.total, times * part.accumulator)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    offsets = arrays["sample_idx_q"], arrays["sample_idx_k"]
    block_size = arrays["block_n"].item()
    ends = {int(level): end for level, _, end in arrays["mask_ratios_f64"].tolist()}
    bounds = np.maximum.accumulate([ends.get(level, 0.0) for level in (1, 2, 4, 8)])
    thresholds = tuple(arrays["sim_thresholds_2_4_8"].tolist())
    options = {
        "query_block_size": arrays["block_m"].item(),
        "key_block_size": block_size,
        "rule": {"topk": "rank", "thresholdbound": "energy"}[arrays["mask_mode"].item()],
        "bounds": tuple(bounds.tolist()),
        "tile_size": arrays["tile_n"].item(),
        "least_exact_share": arrays["min_full_attn_ratio_f64"].item(),
        "similarity_thresholds": thresholds if arrays["use_sim_mask"] else None,
    }
    published = Published(**options, is_older_kernel=arrays["attn_impl"].item() == "old_mask_type")

    # The authors fill the samples up to a multiple of 64, and rows add up to 1 with what stands there.
    expected = arrays["block_scores"] / arrays["block_scores"].sum(-1, keepdims=True)
    assert_close(jax.jit(published._scores)(query, key, offsets), expected)

    levels = jax.jit(published.select)(query, key, offsets)
    np.testing.assert_array_equal(levels.levels, arrays["level_map"])
    if "sim_cap" in arrays:
        np.testing.assert_array_equal(published._cap(key, thresholds).swapaxes(1, 2), arrays["sim_cap"])

    assert_close(jax.jit(published)(query, key, value, offsets).swapaxes(1, 2), arrays["output"])
    if key.shape[1] % block_size == 0:
        output = jax.jit(PSA(**options))(query, key, value, offsets)
        assert_close(output.swapaxes(1, 2), arrays.get("output_formula", arrays["output"]))
