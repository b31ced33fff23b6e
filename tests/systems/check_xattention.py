"""XAttention against its authors' scores and choice, and softmax attention over that choice."""

import functools

import jax
import numpy as np

from sparse_attn.systems import xattention

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    mode, norm = arrays["select_mode"].item() or "inverse", arrays["norm"].item()
    sizes = {
        "stride": arrays["stride"].item(),
        "block_size": arrays["block_size"].item(),
        "is_causal": arrays["causal"].item(),
        "chunk_size": arrays["chunk_size"].item(),
        "mode": mode,
    }
    if mode == "random":  # theirs draws a permutation of range(stride)
        numbers = np.arange(sizes["stride"])
        (sizes["mode"],) = {tuple(x.tolist()) for x in arrays.values() if np.array_equal(np.sort(x, None), numbers)}
    rows, columns = arrays["block_scores"].shape[2:]  # without the filling up to whole chunks
    score_blocks = functools.partial(xattention.score_blocks, **sizes, scale=query.shape[-1] ** -0.5 / norm)
    scores = jax.jit(score_blocks)(query, key)
    assert_close(scores, arrays["block_scores_padded"][:, :, :rows])
    assert_close(scores[..., :columns], arrays["block_scores"])

    threshold = tuple(np.atleast_1d(arrays["threshold_f64"]).tolist())
    threshold = threshold if len(threshold) > 1 else threshold[0]
    flags = {name: arrays[name].item() for name in ("keep_sink", "keep_recent") if name in arrays}
    options = {**sizes, **flags, "threshold": threshold, "norm": norm}
    mask = jax.jit(functools.partial(xattention.select, **options))(query, key).to_mask()
    trimmed = arrays["block_mask_padded"][:, :, :rows, :columns]
    for published in (arrays["block_mask"], trimmed):
        if sizes["is_causal"]:  # keep_sink of theirs keeps the future too
            published = np.tril(published, np.subtract(*arrays["block_mask_padded"].shape[:1:-1]))
        np.testing.assert_array_equal(mask, published)
    output = jax.jit(functools.partial(xattention.attention, **options))(query, key, value)
    assert_close(output.swapaxes(1, 2), arrays["output"])
