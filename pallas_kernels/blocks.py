"""Where the blocks of keys lie and which keys a query may see: what every floor passes down.

Words, as they are used everywhere:

    block       a run of at most block_size keys that is chosen or not as a whole
    place       index of a key along its row, in block order
    position    where a token stands in the text; causality goes by it. The place, unless keys were reordered
    row         one row of the batch
    choice      which blocks a query attends: lists of blocks (per query) or a table of tiles and blocks (per tile)
    tile        queries that are multiplied with one block at a time
    chunk       queries in work at a time; bounds the memory
    pair        a query and one of its chosen blocks
    page        block_size keys in memory, aligned, as a kernel loads them; a piece of a block is what lies in one page
    panel       blocks whose means a router takes at a time
    group       query heads that read one key/value head

Keys stand in *block order*: segment by segment, in sequence order inside a segment, padding last. A block is then a run
of consecutive places, and what a query may see is one interval of them:

    segments            a a a a a | b b b | padding          block_size 2
    places              0 1 2 3 4   5 6 7   8 9
    blocks             [0 1|2 3|4] [5 6|7]                    start 0 2 4 5 7, length 2 2 1 2 1
    4th query of a      sees places 0..3: start 0, stop 4, first_block 0, last_block 1
"""

import dataclasses

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, jax.Array, jax.Array]
"""Query `[batch, queries, heads, head_dim]`, key `[batch, keys, kv_heads, head_dim]` and value `[batch, keys, kv_heads,
value_head_dim]`, of one dtype; heads is a multiple of kv_heads."""
Results = tuple[jax.Array, jax.Array]
"""Output `[batch, queries, heads, value_head_dim]`, and the natural log-sum-exp of the logits, float32 `[batch,
queries, heads]`; zero and -inf for a query with nothing to attend to."""
NOWHERE = jnp.iinfo(jnp.int32).max
"""The position of a key that nobody sees."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The geometry of one call, made once (`sparse_attn.layout.make_blocks`). All arrays int32.

    Attributes:
      start: `[batch, queries]`; a query sees the keys whose position p has start <= p < stop.
      stop: `[batch, queries]`; equal to start for a query with nothing to attend to.
      position: `[batch, keys, kv_heads]`, or `[batch, keys, 1]` for all heads, of keys that were reordered; NOWHERE for
        padding. None: the position of a key is its place.
      block_start: `[batch, blocks]`, place of a block's first key.
      block_length: `[batch, blocks]`, keys in the block, 0 where there is no such block.
      first_block: `[batch, queries]`, the block that holds the first key the query sees.
      last_block: `[batch, queries]`, the block that holds the last one (causal: the query's own block); first_block - 1
        for a query with nothing to attend to.
      block_size: keys in a full block.
      num_keys: keys in a row, padding included.
      is_packed: whether rows hold several segments, so that behind a short block another segment's keys follow.
    """

    start: jax.Array
    stop: jax.Array
    position: jax.Array | None
    block_start: jax.Array
    block_length: jax.Array
    first_block: jax.Array
    last_block: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})
    num_keys: int = dataclasses.field(metadata={"static": True})
    is_packed: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_blocks(self) -> int:
        """Upper bound of the number of blocks in a row."""
        return self.block_start.shape[1]

    @property
    def max_choices(self) -> int:
        """The most blocks that one query can attend: those of a row without segments."""
        return -(-self.num_keys // self.block_size)

    def key_position(self) -> jax.Array:
        """The position of every key, int32 `[batch, keys, kv_heads or 1]`."""
        if self.position is not None:
            return self.position
        place = jnp.arange(self.num_keys, dtype=jnp.int32)[None, :, None]
        return jnp.broadcast_to(place, (self.start.shape[0], self.num_keys, 1))

    def block_of_key(self) -> jax.Array:
        """Block of every place, int32 `[batch, keys]`; padding counts to the last block before it.

        Example: blocks of 2 keys over segments of 3 and 2 keys: `[0, 0, 1, 2, 2]`.
        """
        place = jnp.arange(self.num_keys, dtype=jnp.int32)
        if not self.is_packed:
            return jnp.broadcast_to(place // self.block_size, (self.block_start.shape[0], self.num_keys))
        find = jax.vmap(lambda start: jnp.searchsorted(start, place, side="right"))
        return find(self.block_start).astype(jnp.int32) - 1

    def reachable(self, indices: jax.Array) -> jax.Array:
        """Lists of blocks `[batch, heads, queries, top_k]` without those that hold nothing for the query: -1 there."""
        first, last = self.first_block[:, None, :, None], self.last_block[:, None, :, None]  # [batch, 1, queries, 1]
        return jnp.where((first <= indices) & (indices <= last), indices, -1)

    def axes(self) -> "Blocks":
        """The axes of the arrays as words, see `sparse_attn.sharding`."""
        words = jax.tree.map(lambda _: "b", self)
        is_by_head = self.position is not None and self.position.shape[2] > 1
        return dataclasses.replace(words, position="b.k") if is_by_head else words
