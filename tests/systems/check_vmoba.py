"""VMoBA against its authors' order, means, scores, choices of every scope and outputs.

The authors pack a batch into one sequence and let its rows share budgets; the files of several rows hold that.
"""

import dataclasses
import functools

import jax
import numpy as np

from sparse_attn.grammar import order, score
from sparse_attn.grammar.describe import block_mean
from sparse_attn.systems.vmoba import VMoBA

SCOPES = {"query_head": "query", "block": "block", "overall": "all", "head_global": "head"}
assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(VMoBA):
    """With the authors' error: the scopes "head" and "all" run over all rows of the batch."""

    @property
    def _pairs(self):
        return ("b" if self.scope in ("head", "all") else "") + super()._pairs


def check(arrays):
    query, key, value = (arrays[name] for name in "qkv")
    batch, num_tokens, num_heads, _ = query.shape
    shapes = {
        "grid_shape": tuple(int(size) for size in arrays["resolution_thw"]),
        "box_shape": tuple(arrays["chunk_size_spec_f64"].tolist()),
    }
    token_order, block_size = order.boxes(**shapes)
    assert block_size == arrays["block_len"].item()
    np.testing.assert_array_equal(token_order, arrays["perm"])

    means = np.asarray(jax.jit(lambda key: block_mean(key[:, token_order], block_size))(key))
    num_blocks = means.shape[1]
    starts = [num_tokens * row + block_size * block for row in range(batch) for block in range(num_blocks)]
    np.testing.assert_array_equal([*starts, batch * num_tokens], arrays["cu_chunk"])
    np.testing.assert_array_equal(num_tokens * np.arange(batch + 1), arrays["cu_seqlens"])
    means = means.reshape(1, -1, *means.shape[2:])  # all boxes of the pack
    assert_close(means[0], arrays["block_mean_k"])
    packed = query[:, token_order].reshape(1, -1, *query.shape[2:])
    assert_close(jax.jit(score.dot)(packed, means)[0].transpose(2, 0, 1), arrays["gate"])

    own = np.zeros((batch, num_blocks, batch, num_tokens), bool)
    for row, place in np.ndindex(batch, num_tokens):
        own[row, place // block_size, row, place] = True
    own = own.reshape(batch * num_blocks, batch * num_tokens)
    np.testing.assert_array_equal(own, arrays["self_mask"])

    def as_published(levels):
        """Chosen pairs (boxes of the pack, heads, tokens of the pack in order of boxes) without the own ones."""
        mask = np.zeros((batch, num_blocks, num_heads, batch, num_tokens), bool)
        for row, chosen in enumerate(np.asarray(levels.to_mask())):
            mask[row, :, :, row] = chosen[:, token_order].transpose(2, 0, 1)
        mask = mask.reshape(len(own), num_heads, -1)
        assert mask[np.broadcast_to(own[:, None], mask.shape)].all()
        return mask & ~own[:, None]

    budgets = {"threshold": {"threshold": arrays["tau_f64"].item()}, "topk": {"top_k": arrays["topk"].item()}}
    for name in [name for name in arrays if name.startswith("mask_")]:
        _, rule, scope = name.split("_", 2)
        options = {**shapes, **budgets[rule], "scope": SCOPES[scope]}
        select = jax.jit(Packed(**options).select)
        np.testing.assert_array_equal(as_published(select(query, key)), arrays[name], err_msg=name)
        if batch > 1:  # by default a row chooses as if it were alone
            levels = jax.jit(VMoBA(**options).select)(query, key).levels
            for row in range(batch):
                np.testing.assert_array_equal(levels[row], select(query[row, None], key[row, None]).levels[0])
        if f"out_{rule}_{scope}" in arrays:
            if not arrays[name].any():  # then theirs attends everything
                options["top_k"] = num_blocks
            assert_close(jax.jit(Packed(**options))(query, key, value), arrays[f"out_{rule}_{scope}"])
