"""InfLLM-v2: dense attention that, past a length, reads only the blocks whose pooled keys weigh most."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.backends import Implementation
from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import Sequences, check_attention, check_not_negative, check_positive, check_scale
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.segments import are_among, as_lists, check_segments, means_of, pick, whole_blocks
from sparse_attn.layout import make_blocks, order_keys, zero_padding
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import over_explicit_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfLLMv2:
    """InfLLM-v2: dense attention that, past a length, reads only the blocks whose pooled keys weigh most.

    Paper: InfLLM-V2: Dense-Sparse Switchable Attention (arXiv 2509.24663). Causal, without new weights. Keys are
    pooled: a mean over `pool_size` tokens every `pool_stride`. Every query takes the softmax over the pooled keys that
    end at or before it; the weights are added up over the query heads of a key/value head; a block scores the largest
    weight of a pooled key that overlaps it. The first `initial_blocks`, the own block and the `local_blocks` before it
    are always taken, and the best others fill up to `top_k`; one choice for the group. Sequences shorter than
    `dense_length` read everything. Trained through the attention. In packed rows every segment is such a sequence, with
    a dense length of its own; no pooled key crosses from one to another.

    The defaults are those of MiniCPM4.1 (MiniCPM4: 64 blocks in all).

    Where code and paper disagree: to save time the paper estimates the softmax's denominator from coarser pools (of
    128 tokens, every 64), and the authors' kernels (OpenBMB/infllmv2_cuda_impl at f908e73) do so or not; here it is
    exact. The kernels force the own block and `local_blocks` more, which is followed. They give blocks of the future
    the weight 0, so that these may be chosen, and mask them later; here such places stay empty. They know groups of 16
    query heads only; here a group has any size. No outputs of the authors' code were at hand to compare with: their
    kernels need a GPU.

    Attributes:
      block_size: tokens in a block; the last of a segment may be shorter.
      pool_size: tokens in a pooled key.
      pool_stride: tokens between the starts of two; divides pool_size and block_size.
      initial_blocks: blocks at the start that are always chosen.
      local_blocks: blocks just before the own one that are always chosen.
      top_k: blocks that a query attends, forced ones included.
      dense_length: sequences of fewer tokens attend everything.
      scale: factor of the logits, in the scores too. None: 1 / sqrt(head_dim).
      implementation: as in `moba_attention`.
    """

    block_size: int = 64
    pool_size: int = 32
    pool_stride: int = 16
    initial_blocks: int = 1
    local_blocks: int = 32
    top_k: int = 96
    dense_length: int = 8192
    scale: float | None = None
    implementation: Implementation | None = None

    paper = "2509.24663"
    is_causal = True
    is_trainable = True
    traces_sequences = True

    def __post_init__(self) -> None:
        for name in ("block_size", "pool_size", "pool_stride", "top_k"):
            check_positive(name, getattr(self, name))
        for name in ("initial_blocks", "local_blocks", "dense_length"):
            check_not_negative(name, getattr(self, name))
        check_scale(self.scale)
        if self.pool_size % self.pool_stride or self.block_size % self.pool_stride:
            raise ValueError(f"pool_stride must divide pool_size and block_size, got {self}")
        if self.top_k < self.initial_blocks + self.local_blocks + 1:
            raise ValueError(f"top_k must hold initial_blocks, local_blocks and one more, got {self}")

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Causal softmax attention, softmax(scale q K^T) V, over the tokens of the chosen blocks.

        Args:
          query: `[batch, tokens, heads, head_dim]`, floating point.
          key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          segment_ids: int `[batch, tokens]`, for packed rows: every segment is a sequence of its own.
          seq_lengths: int `[batch]`, real tokens of each row; zeros come out behind them.

        Returns:
          Array of query's shape and dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        query, key, value = map(jnp.asarray, (query, key, value))
        check_attention(query, key, value, self.scale)
        selection = self.select(query, key, segment_ids=segment_ids, seq_lengths=seq_lengths)
        return block_sparse_attention(
            query,
            key,
            value,
            selection,
            is_causal=True,
            scale=self.scale,
            segment_ids=segment_ids,
            seq_lengths=seq_lengths,
            implementation=self.implementation,
        )

    def select(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> BlockSelection:
        """The blocks that each query attends, alike for the query heads of a key/value head, without a gradient.

        Args: those of the call.

        Returns:
          BlockSelection with indices int32 `[batch, heads, tokens, list]`, numbered as `route_moba` does: the own block
          first, then the other forced ones in their order, then the rest by falling score; -1 where a query has fewer.
          A list has top_k places, or more where short segments may need them; rows below dense_length list all blocks.
        """
        query, key = map(jnp.asarray, (query, key))
        sequences = check_segments(query, key, segment_ids, seq_lengths)
        query, key = jax.lax.stop_gradient((query, key))
        return over_explicit_axes(self._select, (query, key, sequences), ("b.h", "b.k", "b"), "bh")

    def _select(self, query: jax.Array, key: jax.Array, sequences: Sequences) -> BlockSelection:
        query, key = (zero_padding(array, sequences.query_seq_lengths) for array in (query, key))
        (batch, num_tokens, num_heads, head_dim), kv_heads = query.shape, key.shape[2]
        blocks, order = make_blocks(query, key, sequences, block_size=self.block_size, is_causal=True)
        if num_tokens < self.dense_length:
            block = blocks.first_block[..., None] + jnp.arange(blocks.max_choices, dtype=jnp.int32)
            indices = jnp.where(block <= blocks.last_block[..., None], block, -1)[:, None]  # [batch, 1, tokens, list]
            indices = jnp.broadcast_to(indices, (batch, num_heads, *indices.shape[2:]))
            return BlockSelection(indices, block_size=self.block_size, num_blocks=blocks.num_blocks)

        # A pooled key is the mean of consecutive strides, which restart at every segment, like blocks.
        strides, _ = make_blocks(query, key, sequences, block_size=self.pool_stride, is_causal=False)
        (ids, before), (stride_ids, strides_before) = whole_blocks(blocks), whole_blocks(strides)
        num_whole, num_strides, in_pool = ids.shape[1], stride_ids.shape[1], self.pool_size // self.pool_stride
        means = means_of(order_keys(key, order), strides, stride_ids)
        means = jnp.pad(means, ((0, 0), (0, in_pool - 1), (0, 0), (0, 0)))
        means = jnp.stack([means[:, lag : lag + num_strides] for lag in range(in_pool)]).mean(0)
        first, first_pool = pick(before, blocks.first_block), pick(strides_before, strides.first_block)
        num_earlier = blocks.last_block - blocks.first_block
        num_ended = (blocks.stop - blocks.start) // self.pool_stride - (in_pool - 1)
        is_short = strides.stop - strides.start < self.dense_length

        # The pooled keys that overlap a block: those that start in it, and the last ones to start before it.
        opening = pick(strides_before, pick(strides.block_of_key(), pick(blocks.block_start, ids)))  # [batch, whole]
        lead, in_block = in_pool - 1, self.block_size // self.pool_stride
        overlapping = opening[..., None] + jnp.arange(lead + in_block)  # [batch, whole, pools], counted from the fill
        fill = ((0, 0), (0, 0), (lead, in_block))
        scale = head_dim**-0.5 if self.scale is None else self.scale
        may_be_short = any(array is not None for array in sequences)
        length = max(self.top_k, -(-(self.dense_length - 1) // self.block_size) if may_be_short else 0)

        def choose_blocks(_: jax.Array, query: jax.Array, *reach: jax.Array) -> jax.Array:
            first_pool, num_ended, first, num_earlier, is_short = reach  # [batch, t]
            has_ended = are_among(first_pool, num_ended, num_strides)
            weights = score.softmax(scale * score.dot(query, means), has_ended)
            weights = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).sum(2)  # [batch, kv_heads, t, pools]
            scores = jax.vmap(lambda row, places: jnp.pad(row, fill)[..., places])(weights, overlapping).max(-1)
            is_open = are_among(
                first + self.initial_blocks, num_earlier - self.initial_blocks - self.local_blocks, num_whole
            )
            scores = jnp.where(is_open & ~is_short[:, None, :, None], scores, jnp.inf)  # the others are forced
            scores = jnp.where(are_among(first, num_earlier, num_whole), scores, -jnp.inf)
            chosen = choose.top_k_indices(scores, length - 1).swapaxes(1, 2)  # [batch, t, kv_heads, length - 1]
            is_kept = (jnp.arange(length - 1) < self.top_k - 1) | is_short[..., None, None]
            return jnp.where(is_kept, chosen, -1)

        arrays = query, first_pool, num_ended, first, num_earlier, is_short
        chosen = choose.by_queries(choose_blocks, arrays, elements_per_query=batch * num_heads * num_strides)
        indices = as_lists(chosen, first, blocks).repeat(num_heads // kv_heads, axis=1)
        return BlockSelection(indices, block_size=self.block_size, num_blocks=blocks.num_blocks)
