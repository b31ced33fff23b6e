"""Block-Attention: the passages of a prompt do not see each other, so the keys and values of each can be cached."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import NOWHERE, Blocks
from sparse_attn.checks import check_arrays, check_integers, check_positive
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import visible_tiles, whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAttention(System):
    """Block-Attention: the passages of a prompt do not see each other, so the keys and values of each can be cached.

    Paper: Block-Attention for Efficient Prefilling (arXiv 2409.15355). The prompt is a row of segments: retrieved
    passages, then the question. A token attends its own segment up to itself; a token of the last segment attends
    everything up to itself. Nothing is scored. Training and inference use the same mask, to which a model must be
    fine-tuned.

    Reuse of a passage: what is computed for a passage does not depend on where it stands, except for the rotation of
    its keys. Cache its values, and its keys before rotation (or undo the rotation: `sparse_attn.keys.rotate` with
    negative positions). For a prompt, concatenate the caches, rotate the keys to the positions they now have, and call
    the system with the queries of the question alone: queries stand at the end of the keys.

    Code and paper: no differences found. The authors' server (TemporaryLoRA/Block-Attention at c84e38b) rotates cached
    keys back and forth in float32 and rounds to bfloat16 each time; keys cached before rotation are spared that. Its
    training mask is dense; the tiles are this library's own and do not change the result.

    Attributes:
      query_block_size: queries in a tile of work.
      key_block_size: keys in a tile of work.
    """

    query_block_size: int = 64
    key_block_size: int = 64

    paper = "2409.15355"
    is_causal = True
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("query_block_size", self.query_block_size)
        check_positive("key_block_size", self.key_block_size)

    def check(self, query: jax.Array, key: jax.Array) -> None:
        """The question may come alone, after cached passages."""
        check_arrays(query, {"key": key})

    @splits_over_mesh("bh", segment_lengths="b")
    def select(self, query: jax.Array, key: jax.Array, segment_lengths: ArrayLike) -> LevelMap:  # type: ignore[override]
        """The tiles that hold some visible pair, alike in all heads; inside them the mask of tokens decides.

        Args: those of the call.
        """
        query, key = map(jnp.asarray, (query, key))
        self.check(query, key)
        return self._tiles(query, self.blocks(query, key, segment_lengths))

    @splits_over_mesh(segment_lengths="b")
    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_lengths: ArrayLike,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Causal softmax attention to the token's own segment, or to everything from the last one.

        Args:
          query: `[batch, queries, heads, head_dim]`, rotated. With fewer queries than keys, query t stands at the place
            of key keys - queries + t: the question after cached passages.
          key: `[batch, keys, kv_heads, head_dim]`, of query's dtype, rotated; heads is a multiple of kv_heads.
          value: shaped like key.
          segment_lengths: int `[batch, segments]`, tokens of each segment, the question's last; rows with fewer
            passages hold zeros among them. Keys behind the sum are padding.
          segment_ids: None, and
          seq_lengths: None: a row is one prompt, and segment_lengths already says where it ends.

        Returns:
          Array `[batch, queries, heads, head_dim]` of query's dtype; zeros for queries in the padding.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        for name, given in (("segment_ids", segment_ids), ("seq_lengths", seq_lengths)):
            if given is not None:
                raise ValueError(f"{name} must be None: segment_lengths says where a row, one prompt, ends")
        query, key, value = self._checked(query, key, value)
        blocks = self.blocks(query, key, segment_lengths)
        levels, scale, implementation = self._tiles(query, blocks), self.factor(query), self.implementation
        partial = attend_levels(query, key, value, levels, blocks, scale=scale, implementation=implementation)
        return partial.output().astype(query.dtype)

    def blocks(self, query: jax.Array, key: jax.Array, segment_lengths: ArrayLike) -> Blocks:
        """The mask of tokens, one interval of positions a query: from the start of its segment, or from 0, to itself.

        Example: lengths 2, 1, 2 of 6 keys: start `[0, 0, 2, 0, 0, 0]`, stop `[1, 2, 3, 4, 5, 0]`; the last is padding.
        """
        if jnp.ndim(segment_lengths) != 2:
            raise ValueError(f"segment_lengths must be [batch, segments], got shape {jnp.shape(segment_lengths)}")
        shape = query.shape[0], jnp.shape(segment_lengths)[1]
        lengths = jnp.asarray(check_integers("segment_lengths", segment_lengths, shape), jnp.int32)
        num_queries, num_keys = query.shape[1], key.shape[1]
        end = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)[:, None]  # [batch, 1, segments]
        begin = end - lengths[:, None]
        position = jnp.arange(num_keys, dtype=jnp.int32)[None]  # [1, keys]
        place = jnp.arange(num_keys - num_queries, num_keys, dtype=jnp.int32)[None, :, None]  # [1, queries, 1]
        is_own = (begin <= place) & (place < end)  # [batch, queries, segments]
        return dataclasses.replace(
            whole_rows(query, key, block_size=self.key_block_size, is_causal=True),
            start=jnp.where(is_own[..., :-1], begin[..., :-1], 0).sum(-1),  # the last segment sees from 0
            stop=jnp.where(is_own.any(-1), place[..., 0] + 1, 0),
            position=jnp.where(position < end[:, :, -1], position, NOWHERE)[..., None],
        )

    def _tiles(self, query: jax.Array, blocks: Blocks) -> LevelMap:
        levels = visible_tiles(blocks, self.query_block_size)  # [batch, 1, query_blocks, key_blocks]
        levels = levels.repeat(query.shape[2], axis=1).astype(jnp.int8)
        return LevelMap(levels, self.query_block_size, self.key_block_size)
