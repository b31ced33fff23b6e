"""Prism against its authors' temperatures, weights, choice and output."""

import functools

import jax
import numpy as np

from sparse_attn.grammar import choose
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.systems.prism import Prism, band_probability

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    assert key.shape[2] == arrays["n_kv_heads"].item()
    size = arrays["block_size"].item()
    given = arrays["high_freq_temp"].item(), arrays["low_freq_temp"].item()
    temperatures = None if arrays["calibrate"].item() else given
    means = [split_blocks(array, size).mean(2) for array in (query, key)]
    visible = Grid.of(query, key, size, is_causal=True).visible

    def visible_of(published):  # where a threshold is not reached before the future, theirs keeps that too
        return published & visible

    np.testing.assert_equal(arrays["blocks_after_frontier"].item(), (arrays["block_mask"] & ~visible).sum())
    for band, is_high, temperature in zip(("high", "low"), (True, False), temperatures or (None, None), strict=True):
        options = {"size": arrays[f"{band}_freq_dim"].item(), "is_high": is_high, "temperature": temperature}
        probability, tau = jax.jit(functools.partial(band_probability, **options))(*means, visible)
        if temperatures is None:
            assert_close(tau, arrays[f"tau_{band}"])
        assert_close(probability, arrays[f"probs_{band}"])
        mask = choose.top_p(probability, arrays[f"{band}_threshold_f64"].item())
        np.testing.assert_array_equal(mask, visible_of(arrays[f"mask_{band}"]))

    prism = Prism(
        high_size=arrays["high_freq_dim"].item(),
        low_size=arrays["low_freq_dim"].item(),
        high_threshold=arrays["high_threshold_f64"].item(),
        low_threshold=arrays["low_threshold_f64"].item(),
        block_size=size,
        temperatures=temperatures,
        keep_first=arrays["force_sink"].item(),
        keep_diagonal=arrays["force_recent"].item(),
    )
    levels = jax.jit(prism.select)(query, key)
    np.testing.assert_array_equal(levels.to_mask(), visible_of(arrays["block_mask"]))
    output = jax.jit(prism)(query, key, value)
    assert_close(output.swapaxes(1, 2), np.nan_to_num(arrays["output"]))  # NaN: nothing is seen
