"""XAttention: antidiagonals of the logits tell how much attention a pair of blocks holds."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.checks import check_arrays, check_positive, check_whole_blocks
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System, per_head

Mode = Literal["inverse", "slash", "double", "triple"]
_SHIFTS: dict[Any, tuple[int, ...]] = {"double": (-1,), "triple": (-1, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(System):
    """XAttention: antidiagonals of the logits tell how much attention a pair of blocks holds.

    Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428). Training-free prefill. The
    logits of every tile of stride x stride tokens are averaged along its antidiagonal; a softmax runs over the tiles of
    a row, and its weights are summed in each pair of blocks. Every query block takes the shortest prefix of key blocks
    by falling score whose mass reaches the threshold. In causal attention the first block and the diagonal come before
    all others, and their mass counts. Causal: keys may be longer than queries by whole blocks.

    Code and paper: the abstract speaks of sums of attention values; both compute means of logits before the softmax,
    which is followed. The authors' code (mit-han-lab/x-attention at e379887) departs from this rule in the chunk of
    queries that starts at the first block, where it credits the diagonal alone and keeps one block too many, and it
    counts the zeros of padded chunks as keys if attention is not causal. Neither is done here. Stride 16 is their other
    setting; the paper searches a threshold for each layer and head.

    Attributes:
      threshold: share of the mass that is kept, between 0 and 1; a tuple: one for each head.
      stride: tokens along the side of a tile, a divisor of block_size.
      block_size: tokens in a block of queries or keys; the last may be shorter.
      is_causal: whether a query sees only keys up to its own position.
      mode: which pairs of a tile are averaged. "inverse": the antidiagonal; "slash": the diagonal; "double", "triple":
        the antidiagonal, of each key plus the next, or of twice the key plus both neighbours, in a ring; or, for each
        key of the tile, the place of the query that it meets, a permutation of range(stride).
      norm: divides the logits of the scores, not those of attention.
      keep_sink: whether the first query block keeps all that it sees, as in the authors' code, which seems to mean the
        first column.
      keep_recent: whether the diagonal is kept without causality too.
    """

    threshold: float | tuple[float, ...] = 0.9
    stride: int = 8
    block_size: int = 128
    is_causal: bool = True
    mode: Mode | tuple[int, ...] = "inverse"
    norm: float = 1.0
    keep_sink: bool = False
    keep_recent: bool = False

    paper = "2503.16428"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("stride", self.stride)
        check_positive("block_size", self.block_size)
        if self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size={self.block_size}, got stride={self.stride}")
        if self.mode not in get_args(Mode) and sorted(self.mode) != list(range(self.stride)):
            raise ValueError(
                f"mode must be one of {get_args(Mode)} or a permutation of {self.stride} numbers, got mode={self.mode}"
            )

    @property
    def whole(self) -> str:
        return "h" if isinstance(self.threshold, tuple) else ""

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_arrays(query, {"key": key})
        if self.is_causal:
            check_whole_blocks(query, key, self.block_size)

    def scores(self, query: jax.Array, key: jax.Array, grid: Grid) -> jax.Array:
        """Softmax weights of the tiles of stride x stride tokens, summed in every pair of blocks.

        Tile (r, c) has the logit scale / stride * sum_j q[r stride + stride - 1 - j] . k[c stride + j], in the mode
        "inverse"; causal, tile row r sees the tile columns up to its own. Tile rows behind the last query count
        nothing. The tiles of one query block are alive at once.

        Args:
          query: `[batch, queries, heads, head_dim]`.
          key: `[batch, keys, kv_heads, head_dim]`.
          grid: says at which key block the first query block stands.

        Returns:
          float32 `[batch, heads, query_blocks, key_blocks]`; rows sum to the tile rows that queries fill.
        """
        (batch, num_queries, num_heads, head_dim), (num_keys, kv_heads) = query.shape, key.shape[1:3]
        stride, tiles = self.stride, self.block_size // self.stride  # tiles along the side of a block
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        query = split_blocks(query.astype(dtype), self.block_size)
        query = query.reshape(batch, -1, tiles, stride, kv_heads, num_heads // kv_heads, head_dim)
        key = split_blocks(key.astype(dtype), self.block_size).reshape(batch, -1, stride, kv_heads, head_dim)
        for shift in _SHIFTS.get(self.mode, ()):
            key += jnp.roll(key, shift, axis=2)
        if self.mode != "slash":
            key = key[:, :, ::-1] if isinstance(self.mode, str) else key[:, :, np.argsort(self.mode)]
        column = jnp.arange(key.shape[1])[None]
        first_row = tiles * (grid.key_blocks - grid.query_blocks)

        def score_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            query, first = block  # [batch, tiles, stride, kv_heads, group, head_dim], first tile row
            # Axes: t tile rows, c tile columns, n tokens of a tile.
            logits = jnp.einsum("btnkgd,bcnkd->bkgtc", query, key, precision="highest")
            logits *= self.factor(query) / self.norm / stride
            row = first + jnp.arange(tiles)[:, None]
            is_seen = (column * stride < num_keys) & (row * stride < num_queries)
            if self.is_causal:
                is_seen &= column <= row + first_row
            weights = score.softmax(logits, is_seen)
            return weights.reshape(batch, num_heads, tiles, -1, tiles).sum((2, 4))

        blocks = query.swapaxes(0, 1), jnp.arange(query.shape[1]) * tiles
        return jnp.moveaxis(jax.lax.map(score_block, blocks), 0, 2)

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        share = per_head(self.threshold, query.shape[2])
        grid = Grid.of(query, key, self.block_size, is_causal=self.is_causal)
        credited = grid.first | grid.diagonal if self.is_causal else None
        chosen = choose.top_p(self.scores(query, key, grid), share, credited)
        is_sink = self.keep_sink & (grid.row == grid.row[0])
        return grid.choose(chosen | is_sink | (self.keep_recent & grid.diagonal))
