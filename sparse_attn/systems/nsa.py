"""NSA: three attentions side by side, over block means, a few whole blocks and a window, added under gates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import Blocks
from sparse_attn.attend.backends import Implementation
from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import Sequences, check_attention, check_not_negative, check_positive, check_scale
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.grammar.segments import (
    are_among,
    as_lists,
    check_segments,
    in_segment_order,
    means_of,
    pick,
    whole_blocks,
)
from sparse_attn.layout import make_blocks, order_keys, whole_rows, zero_padding
from sparse_attn.selection import BlockSelection, LevelMap
from sparse_attn.sharding import over_explicit_axes
from sparse_attn.window import sliding_window_attention

_TILE_SIZE = 128  # queries and means of a tile of the compressed branch


def compressed_weights(
    query: jax.Array, means: jax.Array, first: jax.Array, num_ended: jax.Array, scale: float
) -> jax.Array:
    """The weights of the compressed branch: softmax(scale q mean) over the means that a query sees.

    Args:
      query: `[batch, t, heads, head_dim]`.
      means: `[batch, means, kv_heads, head_dim]`.
      first: int `[batch, t]`, the first mean of a query's segment.
      num_ended: int `[batch, t]`, how many there are up to the query.
      scale: factor of the logits.

    Returns:
      float32 `[batch, heads, t, means]`; zeros for a query that sees none.
    """
    has_ended = are_among(first, num_ended, means.shape[1])
    return score.softmax(scale * score.dot(query, means), has_ended)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSA:
    """NSA: three attentions side by side, over block means, a few whole blocks and a window, added under gates.

    Paper: Native Sparse Attention (arXiv 2502.11089). Causal. Every query token
      1. attends the mean key and value of every block that has ended (the compressed branch);
      2. takes the softmax weights of 1, adds them up over the query heads of a key/value head, and attends the tokens
         of the `top_k` best blocks, its own always among them (the selected branch; one choice for the group);
      3. attends the last `window_size` tokens.
    The output is the sum of the three, each times its gate: a number for every token and query head that the model
    computes (in the paper a sigmoid of the token's features). Gradients flow through branches and gates, not through
    the choice.

    Where code and paper disagree, the reference of fla-org/native-sparse-attention (at bd67af5) is followed:
    descriptions are means over the selected branch's own blocks, and only the own block is forced. The paper has
    learned compression of overlapping blocks (32 tokens, every 16), keys and values of its own for each branch, and
    also forces the first block. The reference's path for packed sequences writes block 0 where a query has fewer than
    top_k blocks and so counts it several times; here such places stay empty. Its means count the padding behind a
    ragged end, which nobody attends.

    Attributes:
      block_size: tokens in a block; the last of a segment may be shorter.
      top_k: blocks of the selected branch, the own one included.
      window_size: tokens of the window, the query's own included. 0: no window.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      implementation: of the selected branch, as in `moba_attention`.
    """

    block_size: int = 64
    top_k: int = 16
    window_size: int = 512
    scale: float | None = None
    implementation: Implementation | None = None

    paper = "2502.11089"
    is_causal = True
    is_trainable = True
    traces_sequences = True

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        check_positive("top_k", self.top_k)
        check_not_negative("window_size", self.window_size)
        check_scale(self.scale)

    def select(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> BlockSelection:
        """The blocks of the selected branch, alike for the query heads of a key/value head, without a gradient.

        Args: those of the call.

        Returns:
          BlockSelection with indices int32 `[batch, heads, tokens, top_k]`, numbered as `route_moba` does: the own
          block first, then by falling score, -1 where a query has fewer blocks.
        """
        query, key = map(jnp.asarray, (query, key))
        sequences = check_segments(query, key, segment_ids, seq_lengths)

        def call(query: jax.Array, key: jax.Array, sequences: Sequences) -> BlockSelection:
            query, key = (zero_padding(array, sequences.query_seq_lengths) for array in (query, key))
            blocks, order = make_blocks(query, key, sequences, block_size=self.block_size, is_causal=True)
            return self._choose(query, order_keys(key, order), blocks)

        return over_explicit_axes(call, (query, key, sequences), ("b.h", "b.k", "b"), "bh")

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        gates: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """gates_0 compressed + gates_1 selected + gates_2 window, each softmax(scale q K^T) V over its own keys.

        Args:
          query: `[batch, tokens, heads, head_dim]`, floating point.
          key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          gates: floating point `[batch, tokens, heads, 3]`, of the compressed, the selected and the window branch.
          segment_ids: int `[batch, tokens]`, for packed rows: every segment is a sequence of its own.
          seq_lengths: int `[batch]`, real tokens of each row; zeros come out behind them.

        Returns:
          Array of query's shape and dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        query, key, value, gates = map(jnp.asarray, (query, key, value, gates))
        check_attention(query, key, value, self.scale)
        if gates.shape != (*query.shape[:3], 3) or not jnp.issubdtype(gates.dtype, jnp.floating):
            raise ValueError(f"gates must be floating point {(*query.shape[:3], 3)}, got {gates.dtype}{gates.shape}")
        sequences = check_segments(query, key, segment_ids, seq_lengths)
        operands, axes = (query, key, value, gates, sequences), ("b.h", "b.k", "b.k", "b.h", "b")
        return over_explicit_axes(self._attend, operands, axes, "b.h")

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, gates: jax.Array, sequences: Sequences
    ) -> jax.Array:
        lengths, segment_ids = sequences.query_seq_lengths, sequences.query_segment_ids
        query, key, value, gates = (zero_padding(array, lengths) for array in (query, key, value, gates))
        blocks, order = make_blocks(query, key, sequences, block_size=self.block_size, is_causal=True)
        ordered = order_keys(key, order), order_keys(value, order)
        options: dict[str, Any] = {"segment_ids": segment_ids, "seq_lengths": lengths, "is_causal": True}
        options |= {"scale": self._factor(query), "implementation": self.implementation}
        selection = self._choose(query, ordered[0], blocks)
        output = gates[..., :1] * self._compress(query, *ordered, blocks)
        output += gates[..., 1:2] * block_sparse_attention(query, key, value, selection, **options)
        if self.window_size != 0:
            output += gates[..., 2:] * in_segment_order(self._slide, (query, key, value), segment_ids)
        return output.astype(query.dtype)

    def _factor(self, query: jax.Array) -> float:
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _choose(self, query: jax.Array, key: jax.Array, blocks: Blocks) -> BlockSelection:
        """`select` with the key in block order."""
        query, key = jax.lax.stop_gradient((query, key))
        batch, _, num_heads, _ = query.shape
        kv_heads = key.shape[2]
        ids, before = whole_blocks(blocks)
        means, first = means_of(key, blocks, ids), pick(before, blocks.first_block)
        num_whole = ids.shape[1]

        def choose_blocks(
            _: jax.Array, query: jax.Array, first: jax.Array, num_ended: jax.Array, num_earlier: jax.Array
        ) -> jax.Array:
            weights = compressed_weights(query, means, first, num_ended, self._factor(query))
            scores = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).sum(2)  # [batch, kv_heads, t, whole]
            scores = jnp.where(are_among(first, num_earlier, num_whole), scores, -jnp.inf)
            return choose.top_k_indices(scores, self.top_k - 1).swapaxes(1, 2)

        reach = first, (blocks.stop - blocks.start) // self.block_size, blocks.last_block - blocks.first_block
        elements = batch * num_heads * num_whole
        chosen = choose.by_queries(choose_blocks, (query, *reach), elements_per_query=elements)
        indices = as_lists(chosen, first, blocks).repeat(num_heads // kv_heads, axis=1)
        return BlockSelection(indices, block_size=self.block_size, num_blocks=blocks.num_blocks)

    def _compress(self, query: jax.Array, key: jax.Array, value: jax.Array, blocks: Blocks) -> jax.Array:
        """The compressed branch, with keys and values in block order: a block counts as one key."""
        ids, before = whole_blocks(blocks)
        means = means_of(key, blocks, ids), means_of(value, blocks, ids)  # [batch, whole, kv_heads, head_dim]
        first, query = pick(before, blocks.first_block), query.astype(means[0].dtype)
        stop = first + (blocks.stop - blocks.start) // self.block_size
        seen = whole_rows(query, means[0], block_size=_TILE_SIZE, is_causal=False)
        seen = dataclasses.replace(seen, start=first, stop=stop)
        tiles = (-(-array.shape[1] // _TILE_SIZE) for array in (query, means[0]))
        all_tiles = jnp.ones((query.shape[0], query.shape[2], *tiles), jnp.int8)
        levels = LevelMap(all_tiles, query_block_size=_TILE_SIZE, key_block_size=_TILE_SIZE)
        return attend_levels(query, *means, levels, seen, scale=self._factor(query)).output()

    def _slide(self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        scale = self._factor(query)
        return sliding_window_attention(
            query, key, value, window_size=self.window_size, scale=scale, segment_ids=segment_ids
        )
