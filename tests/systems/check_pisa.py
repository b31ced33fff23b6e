"""PISA against its authors' block summaries, scores, choice and attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.grammar import rest, score
from sparse_attn.grammar.describe import block_lengths, block_mean
from sparse_attn.layout import whole_rows
from sparse_attn.systems.pisa import PISA, describe, score_blocks

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(PISA):
    """With the error of the authors' kernel: mean keys come in groups, and the tail's mass is not rescaled between.

    Attributes:
      group_size: mean keys in a group.
    """

    group_size: int

    def _tail(self, query, key, key_mean, value_mean, levels):
        """The tail's mass counts each group by the running maximum that it met, as if that were the last."""
        tail = super()._tail(query, key, key_mean, value_mean, levels)
        size, scale = self.block_size, self.factor(query)
        blocks = whole_rows(query, key, block_size=size, is_causal=False)
        largest = score.exact_blocks(query, key, blocks, query_block_size=1, key_block_size=size, scale=scale)
        is_exact = levels.to_mask().repeat(size, axis=2)[:, :, : query.shape[1]]
        running = jnp.where(is_exact, largest, -jnp.inf).max(-1).swapaxes(1, 2)  # [batch, queries, heads]
        count = jnp.broadcast_to(block_lengths(key.shape[1], size)[None, :, None, None], key_mean.shape)
        mass = jnp.zeros_like(running)
        for start in range(0, key_mean.shape[1], self.group_size):
            is_in_group = jnp.arange(key_mean.shape[1]) // self.group_size == start // self.group_size
            used = (levels.levels == 0) & is_in_group[None, None, None]
            part = rest.pooled(query, key_mean, count, jnp.zeros((1, 1)), used, query_block_size=size, scale=scale)
            running = jnp.maximum(running, part.maximum)
            mass += jnp.exp(part.maximum - running) * part.accumulator[..., 0]
        return tail._replace(total=jnp.where(mass > 0, mass * jnp.exp(running - tail.maximum), 0))


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    size = {"block_size": arrays["block_size"].item()}
    scale, use_moment_norm = arrays["scale_f64"].item(), arrays["use_bias"].item()
    options = {**size, "density": arrays["density_f64"].item(), "use_moment_norm": use_moment_norm, "scale": scale}

    key_mean, value_mean, moments = jax.jit(functools.partial(describe, **size))(key, value)
    lengths = np.asarray(block_lengths(key.shape[1], size["block_size"]))[:, None, None]
    assert_close(block_mean(query, size["block_size"]).swapaxes(1, 2), arrays["q_mean"])
    assert_close(key_mean.swapaxes(1, 2), arrays["k_mean"])
    assert_close((value_mean * lengths).swapaxes(1, 2), arrays["v_sum"])
    assert_close(moments.sum(1), arrays["h_total"])
    if "h_norm" in arrays:
        assert_close(np.linalg.norm(moments, axis=(-2, -1)).swapaxes(1, 2), arrays["h_norm"])
    ranked = moments if use_moment_norm else None
    scores = jax.jit(functools.partial(score_blocks, **size, scale=scale))(query, key_mean, ranked)
    assert_close(scores, arrays["block_scores"])

    pisa = PISA(**options)
    levels = jax.jit(pisa.select)(query, key, value)
    mask = np.asarray(levels.to_mask())
    np.testing.assert_array_equal(mask, arrays["block_mask"])
    assert (mask.sum(-1) == arrays["top_k"]).all()
    np.testing.assert_array_equal(np.sort(arrays["indices"]), np.nonzero(mask)[-1].reshape(arrays["indices"].shape))

    output = jax.jit(pisa)(query, key, value).swapaxes(1, 2)
    assert_close(output, arrays.get("output_rescaled_formula", arrays["output"]))
    published = jax.jit(Published(**options, group_size=arrays["group_size"].item()))(query, key, value)
    assert_close(published.swapaxes(1, 2), arrays["output"])
    if arrays["tail_mass_defect_visible"]:
        assert np.abs(output - arrays["output"]).max() > 1e-3
