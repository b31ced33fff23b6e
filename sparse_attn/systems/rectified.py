"""Rectified SpaAttn: exact attention to some blocks, scaled to its share of the mass; pooled attention elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.checks import check_not_negative, check_positive, check_self_attention, check_share
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import block_lengths, block_mean, block_spread
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedSpaAttn(System):
    """Rectified SpaAttn: exact attention to some blocks, scaled to its share of the mass; pooled attention elsewhere.

    Paper: Rectified SpaAttn (arXiv 2511.19835). Training-free and bidirectional, for video diffusion. Means of query
    and key blocks give a pooled attention P; text keys are not pooled, and a video block counts as often as it has
    tokens. Attended exactly are the blocks of the largest P up to a share of the mass, a minimum number of them, forced
    ones, and all text. Of the others those are *compensated* whose gain |mean q . mean k| exceeds an estimate of the
    error of pooling, |mean|dq| . mean k| + |mean q . mean|dk||, with dq and dk the differences from the mean. With O_s
    the exact softmax attention and R the mass of all that is not compensated, O = R O_s + sum over compensated blocks
    of P mean(v). Text queries attend everything.

    The defaults are those of the authors' scripts for Wan2.1, with a quarter of the blocks at least (a fifth for
    Hunyuan, a tenth for Flux). Video tokens come along `order.space_filling_curve`, with text behind them: hidden
    states may be permuted once for all layers. Forced are the curve's `order.neighbouring_blocks` and, for Wan, the
    first frame among itself. The first 10 denoising steps and 2 layers are dense there: a caller's matter.

    Where code and paper disagree, the authors' code (BienLuky/Rectified-SpaAttn at 4b0aa10) is followed: text is one
    more entry of the ranking. One error of theirs is corrected: means and weight of a short last block run over the
    tokens it has, not over zeros behind it too. Their code takes batches of one, and whole blocks before text.

    Attributes:
      block_size: tokens in a block; the last may be shorter.
      threshold: share of P that the kept blocks reach, between 0 and 1.
      top_k: blocks that are kept at least. None: a quarter.
      text_length: tokens of text, at the end of a row.
    """

    block_size: int = 128
    threshold: float = 0.3
    top_k: int | None = None
    text_length: int = 0

    paper = "2511.19835"
    is_causal = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)
        check_share("threshold", self.threshold)
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
        check_not_negative("text_length", self.text_length)

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_self_attention(query, key)
        if self.text_length >= key.shape[1]:
            text_length = self.text_length
            raise ValueError(f"text_length must be below the {key.shape[1]} tokens, got {text_length=}")

    @splits_over_mesh("bh")
    def select(self, query: jax.Array, key: jax.Array, forced: ArrayLike | None = None) -> LevelMap:
        """What the video's query blocks do with its key blocks: 1 attend exactly, 2 compensate, 0 neither.

        Args: those of the call.
        """
        query, key, _ = self._checked(query, key, key)
        return self._select(*jax.lax.stop_gradient((query, key)), forced)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        forced: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """R O_s + sum over compensated blocks of P mean(v) for the video, full attention for text queries.

        Every sequence ends with its text.

        Args, besides those of `System`, which also says what is returned and raised:
          forced: bool `[blocks, blocks]`, pairs of the video's blocks that are kept besides, in every sequence:
            neighbours, the first frame among itself. None: no pair.
        """

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, forced)

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    @splits_over_mesh()
    def _call(self, query: jax.Array, key: jax.Array, value: jax.Array, forced: ArrayLike | None = None) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        levels = self._select(*jax.lax.stop_gradient((query, key)), forced)
        probability, _ = self.weigh(query, key)
        num_video = query.shape[1] - self.text_length
        video = query[:, :num_video]
        exact = self._attend(video, key[:, :num_video], value[:, :num_video], levels)
        if self.text_length:
            exact = merge(exact, self._attend_all(video, key[:, num_video:], value[:, num_video:]))
        corrections = self.rectify(probability, levels, value)
        factor, compensation = (array.repeat(self.block_size, axis=1)[:, :num_video] for array in corrections)
        output = factor * exact.output() + compensation
        if self.text_length:
            text = self._attend_all(query[:, num_video:], key, value)
            output = jnp.concatenate([output, text.output()], axis=1)
        return output.astype(query.dtype)

    def _select(self, query: jax.Array, key: jax.Array, forced: ArrayLike | None = None) -> LevelMap:
        probability, has_gain = self.weigh(query, key)
        top_k = max(1, has_gain.shape[3] // 4) if self.top_k is None else self.top_k
        kept = (choose.top_p(probability, self.threshold) | choose.top_k(probability, top_k))[..., :-1]
        if forced is not None:
            forced = jnp.asarray(forced)
            if forced.shape != kept.shape[2:] or forced.dtype != bool:
                raise ValueError(f"forced must be bool {kept.shape[2:]}, got {forced.dtype} of shape {forced.shape}")
            kept |= forced[None, None]
        levels = jnp.where(kept, 1, jnp.where(has_gain, 2, 0)).astype(jnp.int8)
        return LevelMap(levels, self.block_size, self.block_size)

    def weigh(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """P, float32 `[batch, heads, query_blocks, key_blocks + 1]`, the last column all text; and where it gains, bool
        `[batch, heads, query_blocks, key_blocks]`.
        """
        text_key, scale = key[:, key.shape[1] - self.text_length :], self.factor(query)
        query, key = self._video(query), self._video(key)
        query_mean, key_mean = block_mean(query, self.block_size), block_mean(key, self.block_size)
        scores, text_scores = score.dot(query_mean, key_mean), score.dot(query_mean, text_key)
        query_error = score.dot(block_spread(query, self.block_size), key_mean)
        key_error = score.dot(query_mean, block_spread(key, self.block_size))
        log_count = jnp.log(block_lengths(key.shape[1], self.block_size))[None, None, None]
        probability = score.softmax(jnp.concatenate([scale * scores + log_count, scale * text_scores], axis=-1))
        video, text = jnp.split(probability, [scores.shape[-1]], axis=-1)
        has_gain = jnp.abs(scores) > jnp.abs(query_error) + jnp.abs(key_error)
        return jnp.concatenate([video, text.sum(-1, keepdims=True)], axis=-1), has_gain

    def rectify(self, probability: jax.Array, levels: LevelMap, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """R `[batch, query_blocks, heads, 1]` and the compensation `[batch, query_blocks, heads, head_dim]`, float32.

        Args: P and the choice as in `weigh` and `select`, value as in `System`.
        """
        weight = jnp.where(levels.levels == 2, probability[..., :-1], 0)
        mean = block_mean(self._video(value), self.block_size)
        grouped = weight.reshape(weight.shape[0], value.shape[2], -1, *weight.shape[2:])
        compensation = jnp.einsum("bkgij,bjkd->bikgd", grouped, mean, precision="highest")
        factor = (probability.sum(-1) - weight.sum(-1)).swapaxes(1, 2)
        return factor[..., None], compensation.reshape(*factor.shape, -1)

    def _video(self, array: jax.Array) -> jax.Array:
        """The tokens whose blocks are pooled."""
        return array[:, : array.shape[1] - self.text_length]

    def _attend_all(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Partial:
        blocks = (-(-array.shape[1] // self.block_size) for array in (query, key))
        everything = jnp.ones((query.shape[0], query.shape[2], *blocks), jnp.int8)
        return self._attend(query, key, value, LevelMap(everything, self.block_size, self.block_size))
