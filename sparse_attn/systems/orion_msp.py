"""Orion-MSP's pattern: special tokens see and are seen by all; the others see a window and a few random tokens.

Paper: Orion-MSP: Multi-Scale Sparse Attention for Tabular In-Context Learning (arXiv 2511.02818). The tokens are the
features of a row of a table, behind `num_special` special ones (4 class tokens and 8 global ones). Special queries see
all; the others see the special tokens, those at most `window` places away, themselves, and `num_random` tokens drawn
for each query (`draw_links`). No direction of time, nothing scored, one pattern for all heads. Orion-MSP pools groups
of 1, 4 and 16 features and runs the pattern at each scale; that model around it is not part of this file.

Defaults: 12 special tokens, window 8, 2 random links.

Where code and paper disagree: the released code (Lexsi-Labs/Orion-MSP at c89aea6) adds -inf to its window term and so
never opens the window, but for the query itself. Here it is open; `window=0` is what was released. The code draws links
anew at every call; here they are an argument, drawn with an explicit key. It draws them among all tokens that are not
special, the query and its window included, and so does `draw_links`.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_integers, check_not_negative, check_self_attention
from sparse_attn.merge import Partial, merge
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.tokens import attend_tokens
from sparse_attn.visibility import Visibility, make_visibility

RECIPE = Recipe(
    name="Orion-MSP",
    paper="2511.02818",
    blocks="1 / 1",
    describe="none",
    score="none",
    choose="fixed: special tokens, window; random links",
    when="at every scale",
    is_trainable=True,
)

_TILE = 64


def draw_links(random_key: jax.Array, num_tokens: int, *, num_special: int = 12, num_random: int = 2) -> jax.Array:
    """Random links: for every token that is not special, distinct tokens that are not special, all sets equally likely.

    Floyd's sampling (Bentley and Floyd, Communications of the ACM 30(9), 1987), all tokens at once.

    Args:
      random_key: key of `jax.random`.
      num_tokens, num_special, num_random: tokens, special ones among them, and links for a token.

    Returns:
      int32 `[tokens, num_random]`, -1 for no link: for special tokens, and where there are fewer tokens than links.
    """
    check_not_negative("num_special", num_special)
    check_not_negative("num_random", num_random)
    num_others = max(num_tokens - num_special, 0)
    drawn = jnp.full((num_tokens, num_random), -1, jnp.int32)
    for column, last in enumerate(range(max(num_others - num_random, 0), num_others)):
        candidate = jax.random.randint(jax.random.fold_in(random_key, column), (num_tokens,), 0, last + 1)
        is_taken = (drawn == candidate[:, None]).any(1)
        drawn = drawn.at[:, column].set(jnp.where(is_taken, last, candidate))
    is_special = jnp.arange(num_tokens)[:, None] < num_special
    return jnp.where((drawn < 0) | is_special, -1, drawn + num_special)


@splits_over_mesh("bh", links="")
def select(
    query: jax.Array, key: jax.Array, links: jax.Array | None = None, *, num_special: int = 12, window: int = 8
) -> LevelMap:
    """The pattern as a table of single tokens, for looking at short rows; `attention` never builds it.

    Args: those of `attention`.
    """
    check_self_attention(query, key)
    check_not_negative("num_special", num_special)
    check_not_negative("window", window)
    batch, num_tokens, num_heads, _ = query.shape
    place = jnp.arange(num_tokens)
    is_seen = jnp.abs(place[:, None] - place[None]) <= window
    is_seen |= (place[:, None] < num_special) | (place[None] < num_special)
    if links is not None:
        check_integers("links", links, (num_tokens, links.shape[-1]))
        is_seen |= (links[..., None] == place[None, None]).any(1)
    levels = jnp.broadcast_to(is_seen.astype(jnp.int8), (batch, num_heads, num_tokens, num_tokens))
    return LevelMap(levels, query_block_size=1, key_block_size=1)


@splits_over_mesh(links="")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    links: jax.Array | None = None,
    *,
    num_special: int = 12,
    window: int = 8,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, over the pattern: special tokens, window and links, merged.

    Args:
      query: `[batch, tokens, heads, head_dim]`.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      links: int `[tokens, num_random]`, further keys of each query, -1 for none, none twice in a row; see `draw_links`.
        None: no random links.
      num_special: how many of the first tokens see and are seen by all.
      window: how far another token sees to either side.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    check_self_attention(query, key)
    check_not_negative("num_special", num_special)
    check_not_negative("window", window)
    batch, num_tokens, num_heads, _ = query.shape
    if links is None:
        links = jnp.zeros((num_tokens, 0), jnp.int32)
    check_integers("links", links, (num_tokens, links.shape[-1]))
    num_tiles = -(-num_tokens // _TILE)
    every_tile = LevelMap(jnp.ones((batch, num_heads, num_tiles, num_tiles), jnp.int8), _TILE, _TILE)
    place = jnp.arange(num_tokens, dtype=jnp.int32)
    is_special = place < num_special
    none, position = jnp.zeros_like(place), make_visibility(query, key, is_causal=False).position

    def attend_interval(start: jax.Array, stop: jax.Array) -> Partial:  # both [tokens]
        start, stop = (jnp.broadcast_to(bound[None], (batch, num_tokens)) for bound in (start, stop))
        return attend_tiles(query, key, value, every_tile, Visibility(start, stop, position), scale=scale)

    near = attend_interval(
        jnp.where(is_special, num_special, jnp.maximum(place - window, num_special)),
        jnp.where(is_special, num_tokens, place + window + 1),
    )
    partials = [attend_interval(none, none + num_special), near]
    if links.size:
        is_new = (links >= num_special) & (jnp.abs(links - place[:, None]) > window) & ~is_special[:, None]
        further = jnp.where(is_new, links, -1).astype(jnp.int32)[None, None]  # [1, 1, tokens, num_random]
        partials.append(attend_tokens(query, key, value, further, scale=scale))
    return merge(*partials).output().astype(query.dtype)
