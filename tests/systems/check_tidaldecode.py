"""TidalDecode, layer by layer, against the masks and outputs of its authors' accuracy path."""

import functools

import jax
import numpy as np

from sparse_attn.systems.tidal_decode import TidalDecode


def check(arrays):
    attention = TidalDecode(
        top_k=arrays["top_k"].item(),
        first_selecting_layer=arrays["sparse_layer_start"].item(),
        correction_layer=arrays["correction_layer"].item(),
    )
    selection = None
    for step, layer in enumerate(arrays["layer_ids"].tolist()):
        query, key, value = (arrays[name][step].swapaxes(1, 2) for name in "qkv")
        attend = jax.jit(functools.partial(attention, layer=layer))
        output, selection = attend(query, key, value, selection)
        np.testing.assert_allclose(output.swapaxes(1, 2), arrays["output"][step], rtol=0, atol=1e-4)
        if selection is not None:
            np.testing.assert_array_equal(selection.to_mask()[:, :, 0], arrays["token_mask"][step])
