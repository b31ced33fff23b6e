"""BSFA against its authors' calibration, and its rule against the masks stored beside it."""

import functools

import jax
import numpy as np

from sparse_attn.grammar import score
from sparse_attn.layout import whole_rows
from sparse_attn.systems.bsfa import BSFA

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key = (arrays[name].swapaxes(1, 2) for name in "qk")
    assert key.shape[2] == arrays["n_kv_heads"]
    sizes = {"query_block_size": arrays["block_q"].item(), "key_block_size": arrays["block_k"].item()}
    maxima = functools.partial(score.exact_blocks, scale=query.shape[-1] ** -0.5, **sizes)
    blocks = whole_rows(query, key, block_size=sizes["key_block_size"], is_causal=False)
    assert_close(jax.jit(maxima)(query, key, blocks), arrays["block_max"])

    bsfa = BSFA(**sizes)
    select = jax.jit(bsfa.select)
    for place, top_k in enumerate(arrays["k_values"].tolist()):
        calibrate = functools.partial(bsfa.calibrate, top_k=top_k, aggregation=arrays["aggregation"].item())
        thresholds = np.asarray(jax.jit(calibrate)(query, key))
        published = arrays["thresholds"][place]
        missing = published.shape[1] - thresholds.shape[1]
        assert_close(np.pad(thresholds, ((0, 0), (0, missing)), mode="edge"), published)
        for table in (thresholds, published):
            kept = select(query, key, table).to_mask()
            np.testing.assert_array_equal(kept, arrays["kept_mask_restated"][:, place])
