"""BSFA: every tile of logits is computed; where its largest one stays under a threshold, values are skipped."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_attention, check_positive
from sparse_attn.grammar import score
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence

Aggregation = Literal["mean", "median"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSFA(System):
    """BSFA: every tile of logits is computed; where its largest one stays under a threshold, values are skipped.

    Paper: Block Sparse Flash Attention (arXiv 2512.07011). Training-free, for causal prefill of whole prompts. With
    m_ij = max over the queries of block i and the keys of block j of scale q k, a tile wholly before its query block is
    attended exactly if m_ij >= thresholds[head, i]; tiles that overlap the query block always are. The comparison is
    with a fixed number, not with the running maximum of the softmax, so the order of tiles does not matter. The choice
    needs all products of queries and keys; what can be saved is the other half, the products with values. Prompts of at
    most one query block are dense.

    The thresholds belong to one model and length. Those of one layer are float32 `[heads, rows]`; row i is for query
    block i, and query blocks past the last row take the last. A model's table is `[layers, heads, rows]`: give the call
    the part of its layer. -inf keeps everything.

        table = jnp.stack([bsfa.calibrate(query[layer], key[layer]) for layer in range(num_layers)])
        output = bsfa(query[layer], key[layer], value[layer], table[layer])

    Code and paper: the authors' readme (Danielohayon/Block-Sparse-Flash-Attention at c3ee81e) says that the table is
    indexed by key block; their kernel and calibration index it by query block, which is followed. Where the length is
    no multiple of the tile, their kernel keeps one tile more before the query block, which is not done here. Their
    kernel needs a GPU: its calibration is compared with, its attention is not.

    Attributes:
      query_block_size: queries in a block; the last may be shorter.
      key_block_size: keys in a block; the last may be shorter.
    """

    query_block_size: int = 128
    key_block_size: int = 64

    paper = "2512.07011"
    is_causal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("query_block_size", self.query_block_size)
        check_positive("key_block_size", self.key_block_size)

    @splits_over_mesh("bh", thresholds="h")
    def select(self, query: jax.Array, key: jax.Array, thresholds: ArrayLike) -> LevelMap:  # type: ignore[override]
        """The tiles that are attended, without a gradient; arguments as of the call."""
        query, key, thresholds = map(jnp.asarray, (query, key, thresholds))
        self.check(query, key)
        num_heads = query.shape[2]
        if thresholds.ndim != 2 or thresholds.shape[0] != num_heads or thresholds.shape[1] < 1:
            raise ValueError(
                f"thresholds must be [{num_heads} heads, at least 1 row], got thresholds.shape={thresholds.shape}"
            )
        maxima, is_before = self._maxima(query, key)
        row = jnp.minimum(jnp.arange(maxima.shape[2]), thresholds.shape[1] - 1)
        is_kept = (maxima >= thresholds[:, row][None, :, :, None]) | ~is_before
        levels = (is_kept & (maxima > -jnp.inf)).astype(jnp.int8)
        return LevelMap(levels, self.query_block_size, self.key_block_size)

    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        thresholds: ArrayLike,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Causal softmax attention over the tiles that `select` keeps.

        Args:
          query, key, value, segment_ids, seq_lengths: as in `System.__call__`, with as many keys as queries.
          thresholds: float `[heads, rows]`, of this layer, for the same scale and sizes of blocks.

        Returns:
          Array `[batch, queries, heads, head_dim]` of query's dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, thresholds)

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    def calibrate(
        self, query: jax.Array, key: jax.Array, *, top_k: int = 64, aggregation: Aggregation = "mean"
    ) -> jax.Array:
        """One layer's thresholds, from its queries and keys in examples of one length; the paper takes 16.

        For every head and query block of an example the threshold lies half-way between the top_k-th and the next
        largest maximum of the tiles before the query block, -inf if there are not more than top_k.

        Args:
          query: `[examples, tokens, heads, head_dim]`.
          key: `[examples, tokens, kv_heads, head_dim]`.
          top_k: tiles before the query block that its threshold keeps. The authors ship 64 and 96 for general use, 32
            for retrieval.
          aggregation: how examples are brought together, "mean" or "median".

        Returns:
          float32 `[heads, query_blocks]`.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        check_positive("top_k", top_k)
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {aggregation=}")
        query, key = map(jnp.asarray, (query, key))
        self.check(query, key)
        maxima, is_before = self._maxima(query, key)
        best, _ = jax.lax.top_k(jnp.where(is_before[None, None], maxima, -jnp.inf), min(top_k + 1, maxima.shape[-1]))
        midpoint = best[..., -2:].mean(-1)  # -inf where there are fewer
        midpoint = midpoint.mean(0) if aggregation == "mean" else jnp.median(midpoint, axis=0)
        return jnp.where((is_before.sum(-1) > top_k)[None], midpoint, -jnp.inf)

    @splits_over_mesh(thresholds="h")
    def _call(  # type: ignore[override]
        self, query: jax.Array, key: jax.Array, value: jax.Array, thresholds: ArrayLike
    ) -> jax.Array:
        query, key, value = map(jnp.asarray, (query, key, value))
        check_attention(query, key, value, self.scale)
        levels = self.select(query, key, thresholds)
        return self._attend(query, key, value, levels).output().astype(query.dtype)

    def _maxima(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """m_ij, float32 `[batch, heads, query_blocks, key_blocks]`, -inf in the future; and which tiles lie before
        their query block, bool `[query_blocks, key_blocks]`.
        """
        query, key = jax.lax.stop_gradient((query, key))
        maxima = score.exact_blocks(
            query,
            key,
            whole_rows(query, key, block_size=self.key_block_size, is_causal=True),
            query_block_size=self.query_block_size,
            key_block_size=self.key_block_size,
            scale=self.factor(query),
        )
        start = self.query_block_size * jnp.arange(maxima.shape[2])
        end = self.key_block_size * (jnp.arange(maxima.shape[3]) + 1)
        return maxima, end[None, :] <= start[:, None]
