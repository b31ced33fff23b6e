"""Orion-MSP's pattern against its authors' mask, which lacks the window, and the mask with it."""

import jax
import numpy as np

from sparse_attn.systems.orion_msp import OrionMSP


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    links, special = arrays["random_links"], arrays["num_special"].item()
    masks = {arrays["window"].item(): arrays["token_mask_with_window_as_intended"], 0: arrays["token_mask"]}
    for window, expected in masks.items():
        levels = jax.jit(OrionMSP(num_special=special, window=window).select)(query, key, links)
        mask = levels.to_mask()
        np.testing.assert_array_equal(mask, np.broadcast_to(expected, mask.shape))
    released = jax.jit(OrionMSP(num_special=special, window=0))(query, key, value, links)
    np.testing.assert_allclose(released.swapaxes(1, 2), arrays["output"], rtol=0, atol=1e-4)
