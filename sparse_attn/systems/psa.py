"""PSA: the better a key block, the finer it is read: exactly, as means of 2, 4 or 8 keys, or not at all."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.checks import (
    check_integers,
    check_not_negative,
    check_one_of,
    check_positive,
)
from sparse_attn.grammar import choose, describe, rest, score
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence

Offsets = tuple[jax.Array, jax.Array]
Rule = Literal["rank", "energy"]
_LEVELS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSA(System):
    """PSA: the better a key block, the finer it is read: exactly, as means of 2, 4 or 8 keys, or not at all.

    Paper: PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation (arXiv 2512.04025).
    Bidirectional; training-free, or used while a model is distilled into few steps. A quarter of the tokens of every
    block, drawn at random, the same places in all blocks, scores pairs of blocks by exact attention. In every row's
    ranking the best blocks get level 1, the next 2, 4 and 8, and the rest 0: at level h a block is attended as means of
    h keys and values that count h times each. Key blocks whose neighbouring keys differ may be kept from high levels.

    The defaults are those of the authors' configuration class. They ship energy bounds .4, .5, .6, .8 for Wan2.1-14B,
    and .5, .6, .7, .8 with similarity_thresholds .7, .65, .6 for 1.3B, all with key blocks of 128, and draw anew at
    every call. Video tokens come along `order.space_filling_curve`, with text behind them: hidden states may be
    permuted once for all layers. The first 12 to 15 denoising steps are dense there: a caller's matter.

    Where code and paper disagree, the authors' code (ziplab/Pyramid-Sparse-Attention at be122cf) is followed: scores
    are `score.peaks`, not a pooled softmax, and bands are whole tiles. Three errors of theirs are corrected: a ragged
    row is filled with copies of its last token, which levels above 1 count; where two blocks of a level do not fill a
    tile, their newer kernel fills it with means of the row's first keys; their newer modes ignore text_length.

    Attributes:
      query_block_size: tokens in a block of queries, at least 4; the last may be shorter.
      key_block_size: tokens in a block of keys, a multiple of 8 and at least tile_size; the last may be shorter.
      rule: whether bounds are shares of a row's blocks ("rank") or of its scores ("energy").
      bounds: where levels 1, 2, 4 and 8 end in the ranking, as shares in rising order.
      similarity_thresholds: least mean cosine of keys 1, 3 and 7 apart in a block of level 2, 4 and 8. None: no cap.
      text_length: tokens at the end of a row whose key blocks have level 1.
      tile_size: keys or means that the authors' kernel reads at once; bands hold whole tiles.
      least_exact_share: by "energy", level 1 has more than this share of a row's blocks.
    """

    query_block_size: int = 128
    key_block_size: int = 64
    rule: Rule = "rank"
    bounds: tuple[float, float, float, float] = (0.1, 0.15, 0.15, 0.35)
    similarity_thresholds: tuple[float, float, float] | None = None
    text_length: int = 0
    tile_size: int = 32
    least_exact_share: float = 0.06

    paper = "2512.04025"
    is_causal = False
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        query_block_size, key_block_size, tile_size, bounds = (*self._sizes, self.tile_size, self.bounds)
        if query_block_size < 4:
            raise ValueError(f"query_block_size must be at least 4, got {query_block_size=}")
        check_positive("tile_size", tile_size)
        if key_block_size < tile_size or key_block_size % 8:
            raise ValueError(f"key_block_size must be a multiple of 8 and at least {tile_size=}, got {key_block_size=}")
        check_one_of("rule", self.rule, get_args(Rule))
        if len(bounds) != 4 or list(bounds) != sorted(bounds) or bounds[0] < 0 or bounds[3] > 1:
            raise ValueError(f"bounds must be four numbers from 0 to 1 in rising order, got {bounds=}")
        check_not_negative("text_length", self.text_length)

    def draw_offsets(self, random_key: jax.Array, query: jax.Array, key: jax.Array) -> Offsets:
        """Places of the sampled tokens in a block, int32 `[batch, heads, size // 4]` for queries, likewise for keys."""
        draws = zip(jax.random.split(random_key), (query, key), self._sizes, strict=True)
        places = [describe.draw_places(draw, array, size, size // 4) for draw, array, size in draws]
        return places[0], places[1]

    @splits_over_mesh("bh", offsets=("bh", "bk"))
    def select(self, query: jax.Array, key: jax.Array, offsets: Offsets) -> LevelMap:  # type: ignore[override]
        """The level of every pair of blocks: 1 exact, 2, 4 or 8 keys to a mean, 0 skip.

        Args: those of the call.
        """
        query, key, _ = self._checked(query, key, key)
        return self._select(*jax.lax.stop_gradient((query, key)), offsets)

    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        offsets: Offsets,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """One softmax over the keys of level 1 and the means of h keys of level h, with log h added to their logits.

        No gradient flows through the choice.

        Args, besides those of `System`, which also says what is returned and raised:
          offsets: what `draw_offsets` gives; all sequences of a row use the row's.
        """

        def call(row: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, (offsets[0][row], offsets[1][row]))

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    @splits_over_mesh(offsets=("bh", "bk"))
    def _call(  # type: ignore[override]
        self, query: jax.Array, key: jax.Array, value: jax.Array, offsets: Offsets
    ) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        levels = self._select(*jax.lax.stop_gradient((query, key)), offsets)
        return self._attend(query, key, value, levels).output().astype(query.dtype)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.query_block_size, self.key_block_size

    def _select(self, query: jax.Array, key: jax.Array, offsets: Offsets) -> LevelMap:  # type: ignore[override]
        for array, places, size in zip((query, key), offsets, self._sizes, strict=True):
            check_integers("offsets", places, (array.shape[0], array.shape[2], size // 4))
        scores = self._scores(query, key, offsets)
        tiles = tuple(-(-level // (self.key_block_size // self.tile_size)) for level in _LEVELS)  # blocks that fill one
        least = 0 if self.rule == "rank" else int(self.least_exact_share * scores.shape[-1]) + 1
        band = choose.bands(scores, self.bounds, rule=self.rule, multiples=tiles, least_first=least)
        levels = jnp.array((*_LEVELS, 0), jnp.int8)[band]
        if self.text_length:
            has_text = jnp.arange(scores.shape[-1]) >= (key.shape[1] - self.text_length) // self.key_block_size
            levels = jnp.where(has_text[None, None, None], 1, levels)
        if self.similarity_thresholds is not None:
            cap = self._cap(key, self.similarity_thresholds).swapaxes(1, 2)[:, :, None]
            levels = jnp.minimum(levels, cap.repeat(query.shape[2] // key.shape[2], axis=1).astype(jnp.int8))
        return LevelMap(levels, *self._sizes)

    def _scores(self, query: jax.Array, key: jax.Array, offsets: Offsets) -> jax.Array:
        """How near the best sampled logit of a block comes to the row's: `[batch, heads, query_blocks, key_blocks]`."""
        sides = zip((query, key), offsets, self._sizes, strict=True)
        query, key = (describe.sample_blocks(*side) for side in sides)
        samples = {"query_block_size": self.query_block_size // 4, "key_block_size": self.key_block_size // 4}
        return score.peaks(query, key, **samples, scale=self.factor(query))

    def _cap(self, key: jax.Array, thresholds: tuple[float, float, float]) -> jax.Array:
        """The highest level that similarity allows every key block, int32 `[batch, key_blocks, kv_heads]`."""
        return describe.poolable(key, self.key_block_size, thresholds)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        means = (self._means(query, key, value, levels, level) for level in _LEVELS[1:])
        return merge(super()._attend(query, key, value, levels), *means)

    def _means(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap, level: int) -> Partial:
        """Attention to the means of `level` keys in the blocks of that level."""
        return rest.means(query, key, value, levels, level=level, scale=self.factor(query))
