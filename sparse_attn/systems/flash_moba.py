"""FlashMoBA: MoBA with small blocks and a short convolution on the keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_arrays, check_integers
from sparse_attn.grammar.segments import in_segment_order
from sparse_attn.keys import causal_key_convolution
from sparse_attn.layout import zero_padding
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import over_explicit_axes
from sparse_attn.systems.moba import MoBA


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashMoBA(MoBA):
    """FlashMoBA: MoBA with small blocks and a short convolution on the keys.

    Paper: Optimizing Mixture of Block Attention (arXiv 2511.11571). The algorithm of `MoBA` on keys that
    `causal_key_convolution` has spread over their neighbours, k'_t = k_t + silu(sum_l kernel_l k_{t-l}), for routing
    and attention alike. The paper's pairs of (block_size, top_k) keep 7/8 of the keys out: (512, 2), (256, 4),
    (128, 8), the last being the best.

    Where code and paper disagree: the released CUDA kernels take any block size; the choice of width 3 or 5 is the
    paper's.

    Attributes:
      block_size: keys in a block, at least 1.
      top_k: blocks that a query attends, its own included, at least 1.
      is_causal: whether a token sees only tokens up to itself. The convolution is causal in any case.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      implementation: as in `moba_attention`.
    """

    block_size: int = 128
    top_k: int = 8

    paper = "2511.11571"

    def select(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        kernel: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> BlockSelection:
        """The blocks that the call attends: those of `route_moba` on convolved keys. Args: those of the call."""
        key = _convolve(query, key, kernel, segment_ids, seq_lengths)
        return super().select(query, key, segment_ids=segment_ids, seq_lengths=seq_lengths)

    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        kernel: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """`moba_attention` on convolved keys.

        Args:
          query, key, value, segment_ids, seq_lengths: as in `moba_attention`. The convolution crosses no segment.
          kernel: `[width, kv_heads, head_dim]`, the weights of the convolution; the paper's widths are 3 and 5.

        Returns:
          Array of query's shape and dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        key = _convolve(query, key, kernel, segment_ids, seq_lengths)
        return super().__call__(query, key, value, segment_ids=segment_ids, seq_lengths=seq_lengths)


def _convolve(
    query: jax.Array,
    key: jax.Array,
    kernel: jax.Array,
    segment_ids: ArrayLike | None,
    seq_lengths: ArrayLike | None,
) -> jax.Array:
    """The key `[batch, keys, kv_heads, head_dim]` as the published model has it, each segment by itself."""
    query, key, kernel = map(jnp.asarray, (query, key, kernel))
    check_arrays(query, {"key": key})
    ids = check_integers("segment_ids", segment_ids, key.shape[:2])
    lengths = check_integers("seq_lengths", seq_lengths, key.shape[:1])

    def call(
        key: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None, seq_lengths: jax.Array | None
    ) -> jax.Array:
        def convolve(key: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
            return causal_key_convolution(key, kernel, segment_ids)

        return in_segment_order(convolve, (zero_padding(key, seq_lengths),), segment_ids)

    return over_explicit_axes(call, (key, kernel, ids, lengths), ("b.k", ".k", "b", "b"), "b.k")
