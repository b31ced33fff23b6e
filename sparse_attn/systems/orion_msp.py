"""Orion-MSP: special tokens see and are seen by all; the others see a window and a few random tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.attend.per_key import attend_tokens
from sparse_attn.checks import check_integers, check_not_negative, check_self_attention
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence

_TILE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrionMSP(System):
    """Orion-MSP: special tokens see and are seen by all; the others see a window and a few random tokens.

    Paper: Orion-MSP: Multi-Scale Sparse Attention for Tabular In-Context Learning (arXiv 2511.02818). The tokens are
    the features of a row of a table, behind `num_special` special ones (4 class tokens and 8 global ones). Special
    queries see all; the others see the special tokens, those at most `window` places away, themselves, and
    `num_random` tokens drawn for each query (`draw_links`). Bidirectional; nothing is scored, and all heads share one
    pattern. Orion-MSP pools groups of 1, 4 and 16 features and runs the pattern at each scale; that model is not part
    of this file.

    Where code and paper disagree: the released code (Lexsi-Labs/Orion-MSP at c89aea6) adds -inf to its window term and
    so never opens the window except for the query itself. Here it is open; `window=0` is what was released. The code
    draws links anew at every call; here they are an argument, drawn with an explicit key. Like the code, `draw_links`
    draws among all tokens that are not special, the query and its window included.

    Attributes:
      num_special: how many of the first tokens see and are seen by all.
      window: how far another token sees to either side.
      num_random: links that `draw_links` draws for a token.
    """

    num_special: int = 12
    window: int = 8
    num_random: int = 2

    paper = "2511.02818"
    is_causal = False
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_special", "window", "num_random"):
            check_not_negative(name, getattr(self, name))

    def draw_links(self, random_key: jax.Array, num_tokens: int) -> jax.Array:
        """Random links: for each token that is not special, distinct tokens that are not; all sets equally likely.

        Floyd's sampling (Bentley and Floyd, Communications of the ACM 30(9), 1987), all tokens at once.

        Args:
          random_key: key of `jax.random`.
          num_tokens: tokens of the sequence, special ones among them.

        Returns:
          int32 `[tokens, num_random]`, -1 for no link: for special tokens, and where there are fewer tokens than links.
        """
        num_others = max(num_tokens - self.num_special, 0)
        drawn = jnp.full((num_tokens, self.num_random), -1, jnp.int32)
        for column, last in enumerate(range(max(num_others - self.num_random, 0), num_others)):
            candidate = jax.random.randint(jax.random.fold_in(random_key, column), (num_tokens,), 0, last + 1)
            is_taken = (drawn == candidate[:, None]).any(1)
            drawn = drawn.at[:, column].set(jnp.where(is_taken, last, candidate))
        is_special = jnp.arange(num_tokens)[:, None] < self.num_special
        return jnp.where((drawn < 0) | is_special, -1, drawn + self.num_special)

    @splits_over_mesh("bh", links="")
    def select(self, query: jax.Array, key: jax.Array, links: ArrayLike | None = None) -> LevelMap:
        """The pattern as a table of single tokens, to look at short rows; the call never builds it.

        Args: those of the call.
        """
        query, key = map(jnp.asarray, (query, key))
        check_self_attention(query, key)
        batch, num_tokens, num_heads, _ = query.shape
        links = _check_links(links, num_tokens)
        place = jnp.arange(num_tokens)
        is_seen = jnp.abs(place[:, None] - place[None]) <= self.window
        is_seen |= (place[:, None] < self.num_special) | (place[None] < self.num_special)
        is_seen |= (links[..., None] == place[None, None]).any(1)
        levels = jnp.broadcast_to(is_seen.astype(jnp.int8), (batch, num_heads, num_tokens, num_tokens))
        return LevelMap(levels, query_block_size=1, key_block_size=1)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        links: ArrayLike | None = None,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Softmax attention over the pattern: special tokens, window and links.

        Args:
          query: `[batch, tokens, heads, head_dim]`.
          key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          links: int `[tokens, links]`, further keys of each query, -1 for none, none twice in a row; see `draw_links`.
            None: no random links.
          segment_ids: int `[batch, tokens]`, and
          seq_lengths: int `[batch]`, as in `System`. A sequence of n tokens has the first n rows of links; those to
            tokens that it does not have count for none.

        Returns:
          Array `[batch, tokens, heads, head_dim]` of query's dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        check_self_attention(query, key)
        links = _check_links(links, query.shape[1])

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, links[: query.shape[1]])

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    @splits_over_mesh(links="")
    def _call(  # type: ignore[override]
        self, query: jax.Array, key: jax.Array, value: jax.Array, links: jax.Array
    ) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        batch, num_tokens, num_heads, _ = query.shape
        num_tiles = -(-num_tokens // _TILE)
        every_tile = LevelMap(jnp.ones((batch, num_heads, num_tiles, num_tiles), jnp.int8), _TILE, _TILE)
        whole = whole_rows(query, key, block_size=_TILE, is_causal=False)
        place = jnp.arange(num_tokens, dtype=jnp.int32)
        is_special, none = place < self.num_special, jnp.zeros_like(place)
        scale, implementation = self.factor(query), self.implementation

        def attend_interval(start: jax.Array, stop: jax.Array) -> Partial:  # both [tokens]
            start, stop = (jnp.broadcast_to(bound[None], (batch, num_tokens)) for bound in (start, stop))
            blocks = dataclasses.replace(whole, start=start, stop=stop)
            return attend_levels(query, key, value, every_tile, blocks, scale=scale, implementation=implementation)

        near = attend_interval(
            jnp.where(is_special, self.num_special, jnp.maximum(place - self.window, self.num_special)),
            jnp.where(is_special, num_tokens, place + self.window + 1),
        )
        partials = [attend_interval(none, none + self.num_special), near]
        if links.size:
            is_new = (links >= self.num_special) & (links < num_tokens) & ~is_special[:, None]
            is_new &= jnp.abs(links - place[:, None]) > self.window
            further = jnp.where(is_new, links, -1).astype(jnp.int32)[None, None]  # [1, 1, tokens, links]
            partials.append(attend_tokens(query, key, value, further, scale=scale))
        return merge(*partials).output().astype(query.dtype)


def _check_links(links: ArrayLike | None, num_tokens: int) -> jax.Array:
    """The links as an array `[tokens, links]`."""
    if links is None:
        return jnp.zeros((num_tokens, 0), jnp.int32)
    return jnp.asarray(check_integers("links", links, (num_tokens, jnp.shape(links)[-1])))
