"""XAttention against its authors' scores and choice, and softmax attention over that choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.checks import check_arrays
from sparse_attn.grammar import choose
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import per_head
from sparse_attn.systems.xattention import XAttention

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(XAttention):
    """XAttention with the departures of its authors' code (mit-han-lab/x-attention at e379887).

    Rows are padded to whole chunks with zeros, after which diagonals are aligned; without causality these zeros count
    as keys. The chunk of queries that starts at the first block credits the diagonal alone and keeps one block more
    than the shortest prefix. Column 0 is always chosen.
    """

    chunk_size: int

    def check(self, query, key):
        check_arrays(query, {"key": key})

    def chunk_scores(self, query, key):
        """The grid of whole chunks, and the scores [batch, heads, query_blocks, key_blocks of whole chunks]."""
        chunks = [split_blocks(array, self.chunk_size) for array in (query, key)]
        filled = [array.reshape(array.shape[0], -1, *array.shape[3:]) for array in chunks]
        grid = Grid.of(*filled, self.block_size, is_causal=self.is_causal)
        return grid, self.scores(query, filled[1], grid)

    def _select(self, query, key):
        grid, mass = self.chunk_scores(query, key)
        row, column = grid.row[: mass.shape[2]], grid.column
        share = per_head(self.threshold, query.shape[2])
        chosen = choose.top_p(mass, share, (column == 0) | (column == row) if self.is_causal else None)
        if self.is_causal and row[0] == 0:
            kept = choose.top_p(mass, share, column == row).sum(-1, keepdims=True)
            longer = choose.rank(jnp.where(column == row, jnp.inf, mass)) < kept + (share > 0)
            chosen = jnp.where(row < self.chunk_size // self.block_size, longer, chosen)
        chosen |= (column == 0) | (self.keep_recent & (column == row)) | (self.keep_sink & (row == row[0]))
        chosen = (chosen & ((column <= row) | (not self.is_causal)))[..., : -(-key.shape[1] // self.block_size)]
        return LevelMap(chosen.astype(jnp.int8), self.block_size, self.block_size)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    stride, mode = arrays["stride"].item(), arrays["select_mode"].item() or "inverse"
    if mode == "random":  # theirs draws a permutation of range(stride)
        (mode,) = {tuple(x.tolist()) for x in arrays.values() if np.array_equal(np.sort(x, None), np.arange(stride))}
    threshold = tuple(np.atleast_1d(arrays["threshold_f64"]).tolist())
    published = Published(
        threshold=threshold if len(threshold) > 1 else threshold[0],
        stride=stride,
        block_size=arrays["block_size"].item(),
        is_causal=arrays["causal"].item(),
        mode=mode,
        norm=arrays["norm"].item(),
        chunk_size=arrays["chunk_size"].item(),
        **{name: arrays[name].item() for name in ("keep_sink", "keep_recent") if name in arrays},
    )
    rows, columns = arrays["block_scores"].shape[2:]  # without the filling up to whole chunks
    scores = jax.jit(lambda *arrays: published.chunk_scores(*arrays)[1])(query, key)
    assert_close(scores, arrays["block_scores_padded"][:, :, :rows])
    assert_close(scores[..., :columns], arrays["block_scores"])

    mask = jax.jit(published.select)(query, key).to_mask()
    trimmed = arrays["block_mask_padded"][:, :, :rows, :columns]
    for expected in (arrays["block_mask"], trimmed):
        if published.is_causal:  # keep_sink of theirs keeps the future too
            expected = np.tril(expected, np.subtract(*arrays["block_mask_padded"].shape[:1:-1]))
        np.testing.assert_array_equal(mask, expected)
    output = jax.jit(published)(query, key, value)
    assert_close(output.swapaxes(1, 2), arrays["output"])
