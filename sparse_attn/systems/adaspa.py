"""AdaSpa: the blocks that hold the most attention, found exactly at two denoising steps and kept in between."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_not_negative, check_positive
from sparse_attn.grammar import choose, score
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System

_RECALL = 0.8  # heads above it can do with less


class Search(NamedTuple):
    """What a search found, for later steps: the choice, and log_sum_exp, float32 `[batch, tokens, heads]`."""

    levels: LevelMap
    log_sum_exp: jax.Array


_SEARCH_AXES: Any = ("bh", "b.h")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaSpa(System):
    """AdaSpa: the blocks that hold the most attention, found exactly at two denoising steps and kept in between.

    Paper: Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (arXiv 2502.21079). For video
    diffusion, bidirectional. With L_t the log-sum-exp of query t's logits, the mass of a pair of blocks is the sum of
    exp(scale q_t k_s - L_t) over its tokens. Every row of blocks keeps the same number of largest masses, a share
    1 - sparsity of the key blocks. Then heads are adapted: with n heads whose kept mass (recall) is above 0.8, the n
    heads of largest recall keep half as many blocks and the n heads of smallest recall half as many more, so that the
    mean stays. Text tokens, at the end, keep all their rows and columns.

    Masks and L hardly change between denoising steps. A search computes the product of queries and keys once for L and
    once for the masses; a later search may reuse an earlier L and save the former. Both are state, which the caller
    carries:

        adaspa, state = AdaSpa(), None
        for step in range(10, 50):
            if step in (10, 30):
                state = adaspa.search(query, key, None if state is None else state.log_sum_exp)
            output = adaspa(query, key, value, state)

    The paper searches at steps 10 and 30 of 50 and is dense before. At its first search it uses the output of the full
    attention that gave L; here that is a caller's matter.

    No code of the authors was found, and no outputs to compare with: the paper is followed. Its listing has
    log(q k - L) where exp is meant. Chosen here, because it does not say: numbers of blocks are rounded to the nearest,
    at least one, and text comes on top of them; the share is of the key blocks without text; recall runs over all rows;
    n is at most half of the heads, so that no head is of both kinds.

    Attributes:
      sparsity: share of the key blocks that a row leaves out on average, between 1/3 and 1.
      text_length: tokens at the end of a row that see and are seen by all.
      block_size: tokens in a block; the last may be shorter.
    """

    sparsity: float = 0.8
    text_length: int = 0
    block_size: int = 64

    paper = "2502.21079"
    is_causal = False
    whole = "h"  # heads compete

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)
        check_not_negative("text_length", self.text_length)
        if not 1 / 3 <= self.sparsity <= 1:
            sparsity = self.sparsity
            raise ValueError(f"sparsity must be between 1/3, where the densest heads are dense, and 1, got {sparsity=}")

    def select(self, query: jax.Array, key: jax.Array, log_sum_exp: jax.Array | None = None) -> LevelMap:
        """The choice of `search`: levels 0 and 1."""
        levels: LevelMap = self.search(query, key, log_sum_exp).levels
        return levels

    @splits_over_mesh(Search(*_SEARCH_AXES), whole=lambda self: self.whole, log_sum_exp="b.h")
    def search(self, query: jax.Array, key: jax.Array, log_sum_exp: jax.Array | None = None) -> Search:
        """Exact masses of all pairs of blocks, one block of queries at a time, and the choice by them.

        Args:
          query, key: as in `System`; every query head chooses for itself.
          log_sum_exp: that of an earlier search, float32 `[batch, tokens, heads]`, used as it is. None: computed here.

        Raises:
          ValueError: an argument has a wrong shape or dtype.
        """
        query, key, _ = self._checked(query, key, key)
        if log_sum_exp is not None and log_sum_exp.shape != query.shape[:3]:
            shape = log_sum_exp.shape
            raise ValueError(f"log_sum_exp must have shape {query.shape[:3]}, got log_sum_exp.shape={shape}")
        return self._search(*jax.lax.stop_gradient((query, key)), log_sum_exp)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        state: Search | None = None,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Softmax attention, softmax(scale q K^T) V, over the blocks of a search.

        Every sequence ends with its text.

        Args, besides those of `System`, which also says what is returned and raised:
          state: the latest search, of this step or an earlier one, whose choice is taken: a search of whole rows, so it
            must be None with segment_ids or seq_lengths. None: search now.
        """
        if state is None:
            return super().__call__(query, key, value, segment_ids=segment_ids, seq_lengths=seq_lengths)
        if segment_ids is not None or seq_lengths is not None:
            raise ValueError("state must be None with segment_ids or seq_lengths: it is a search of whole rows")
        return self._reuse(query, key, value, state)

    @splits_over_mesh(whole=lambda self: self.whole, state=Search(*_SEARCH_AXES))
    def _reuse(self, query: jax.Array, key: jax.Array, value: jax.Array, state: Search) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        return self._attend(query, key, value, state.levels).output().astype(query.dtype)

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        return self._search(query, key, None).levels

    def _search(self, query: jax.Array, key: jax.Array, log_sum_exp: jax.Array | None) -> Search:
        batch, num_tokens, num_heads, _ = query.shape
        size, num_blocks = self.block_size, -(-num_tokens // self.block_size)
        if log_sum_exp is None:
            full = LevelMap(jnp.ones((batch, num_heads, num_blocks, num_blocks), jnp.int8), size, size)
            log_sum_exp = self._attend(query, key, key, full).log_sum_exp()
        mass = score.exact_blocks(
            query,
            key,
            whole_rows(query, key, block_size=size, is_causal=False),
            query_block_size=size,
            key_block_size=size,
            scale=self.factor(query),
            log_sum_exp=log_sum_exp,
        )
        end = jnp.minimum(size * (jnp.arange(num_blocks) + 1), num_tokens)
        has_text = end > num_tokens - self.text_length  # [blocks]
        is_forced = (has_text[:, None] | has_text[None, :])[None, None]
        ranking = choose.rank(jnp.where(has_text[None, None, None], -jnp.inf, mass))
        num_video = max(0, num_tokens - self.text_length) // size if self.text_length else num_blocks
        count = max(1, round((1 - self.sparsity) * num_video))
        fewer = max(1, count // 2)
        kept_mass = jnp.where((ranking < count) | is_forced, mass, 0).sum((2, 3))
        recall = kept_mass / mass.sum((2, 3))  # [batch, heads]
        place = choose.rank(recall)
        num_adapted = jnp.minimum((recall > _RECALL).sum(-1, keepdims=True), num_heads // 2)
        counts = jnp.where(place < num_adapted, fewer, count)
        counts = jnp.where(place >= num_heads - num_adapted, 2 * count - fewer, counts)
        chosen = (ranking < counts[..., None, None]) | is_forced
        return Search(LevelMap(chosen.astype(jnp.int8), size, size), log_sum_exp)
