"""Orion-MSP's pattern against its authors' mask, which lacks the window, and the mask with it."""

import functools

import jax
import numpy as np

from sparse_attn.systems import orion_msp


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    links, special = arrays["random_links"], {"num_special": arrays["num_special"].item()}
    masks = {arrays["window"].item(): arrays["token_mask_with_window_as_intended"], 0: arrays["token_mask"]}
    for window, expected in masks.items():
        levels = jax.jit(functools.partial(orion_msp.select, **special, window=window))(query, key, links)
        mask = levels.to_mask()
        np.testing.assert_array_equal(mask, np.broadcast_to(expected, mask.shape))
    released = jax.jit(functools.partial(orion_msp.attention, **special, window=0))(query, key, value, links)
    np.testing.assert_allclose(released.swapaxes(1, 2), arrays["output"], rtol=0, atol=1e-4)
