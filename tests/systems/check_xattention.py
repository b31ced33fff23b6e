"""XAttention against its authors' scores and choice, and softmax attention over that choice."""

import functools

import jax
import numpy as np

from sparse_attn.systems import xattention

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    assert arrays["select_mode"].item() == "inverse"
    sizes = {
        "stride": arrays["stride"].item(),
        "block_size": arrays["block_size"].item(),
        "is_causal": arrays["causal"].item(),
        "scale": query.shape[-1] ** -0.5 / arrays["norm"].item(),
    }
    expected = arrays["block_scores"]
    scores = jax.jit(functools.partial(xattention.score_blocks, **sizes))(query, key)
    assert_close(scores, expected)

    threshold = tuple(np.atleast_1d(arrays["threshold_f64"]).tolist())
    threshold = threshold if len(threshold) > 1 else threshold[0]
    options = {**sizes, "threshold": threshold, "chunk_size": arrays["chunk_size"].item()}
    levels = jax.jit(functools.partial(xattention.select, **options))(query, key)
    np.testing.assert_array_equal(levels.to_mask(), arrays["block_mask"])
    rows, columns = expected.shape[2:]  # theirs has whole chunks; behind the end there is no mass
    assert_close(arrays["block_scores_padded"][:, :, :rows, :columns], expected)
    assert not arrays["block_scores_padded"][:, :, :rows, columns:].any()
    np.testing.assert_array_equal(arrays["block_mask_padded"][:, :, :rows, :columns], levels.to_mask())

    if arrays["norm"].item() == 1:  # another norm scales the estimate alone
        output = jax.jit(functools.partial(xattention.attention, **options))(query, key, value)
        assert_close(output.swapaxes(1, 2), arrays["output"])
