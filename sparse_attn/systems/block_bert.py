"""BlockBERT: every head lets a block of queries attend one block of keys, by a fixed permutation of the blocks.

Paper: Blockwise Self-Attention for Long Document Understanding (arXiv 1911.02972). The sequence is n equal blocks. Head
h has a permutation p_h of them: block i of the queries attends block p_h(i) of the keys, in both directions of time.
The identity is local attention; the others are shifts of it and carry what is far away. Cost and memory of attention
fall by n. For pre-training and fine-tuning BERT; nothing is scored.

Defaults: n = 2 with ten heads of the identity and two of the shift by one (for n = 3 take `shifts((8, 2, 2))`). These
splits of BERT-base's twelve heads are quoted from memory of the paper, unchecked.

Where code and paper disagree: unknown, no code is public. Decided here: blocks have ceil(tokens / n) tokens, so that
the last may be shorter.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.checks import check_attention, check_self_attention
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import NOWHERE, Visibility

RECIPE = Recipe(
    name="BlockBERT",
    paper="1911.02972",
    blocks="n equal blocks",
    describe="none",
    score="none",
    choose="fixed: per head one key block, by a permutation",
    is_trainable=True,
)

_LARGEST_TILE = 128  # bounds the logits that are alive; a block is cut into equal tiles of at most so many tokens


def shifts(heads_per_shift: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """One permutation a head: first `heads_per_shift[0]` heads of the identity, then those of the shift by one, ...

    A shift by s of n = len(heads_per_shift) blocks sends block i to i + s modulo n.
    """
    n = len(heads_per_shift)
    return tuple(
        tuple((block + shift) % n for block in range(n))
        for shift, heads in enumerate(heads_per_shift)
        for _ in range(heads)
    )


DEFAULT_PERMUTATIONS = shifts((10, 2))


@splits_over_mesh("bh", whole="h")
def select(
    query: jax.Array, key: jax.Array, *, permutations: tuple[tuple[int, ...], ...] = DEFAULT_PERMUTATIONS
) -> LevelMap:
    """One key block for every query block of every head. Args: those of `attention`."""
    check_self_attention(query, key)
    batch, num_tokens, num_heads, _ = query.shape
    num_blocks = len(permutations[0]) if permutations else 0
    if len(permutations) != num_heads or any(sorted(row) != list(range(num_blocks)) for row in permutations):
        raise ValueError(
            f"permutations must hold one permutation of 0, 1, ..., n - 1 for each of query's {num_heads} heads, "
            f"got permutations={permutations}"
        )
    block_size = -(-num_tokens // num_blocks)
    if -(-num_tokens // block_size) != num_blocks:
        raise ValueError(f"permutations of {num_blocks} blocks leave some of them empty with {num_tokens} tokens")
    levels = np.eye(num_blocks, dtype=np.int8)[np.array(permutations)]  # [heads, query_blocks, key_blocks]
    return LevelMap(jnp.broadcast_to(levels[None], (batch, *levels.shape)), block_size, block_size)


@splits_over_mesh(whole="h")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    permutations: tuple[tuple[int, ...], ...] = DEFAULT_PERMUTATIONS,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, of every block of queries over its head's one block of keys.

    Args:
      query: `[batch, tokens, heads, head_dim]`.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads. Keys are not
        repeated: the heads of a group read different blocks of the same keys.
      value: shaped like key.
      permutations: for each head the key block of query block 0, 1, ..., n - 1; see `shifts`.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; fewer tokens than give n blocks.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(query, key, permutations=permutations)
    batch, num_tokens, num_heads, head_dim = query.shape
    block_size = levels.query_block_size
    tiles = -(-block_size // _LARGEST_TILE)
    tile_size = -(-block_size // tiles)

    def split(array: jax.Array) -> jax.Array:
        """Fills up every block to whole tiles; tokens are the second axis of four."""
        blocks = split_blocks(array, block_size)
        blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, tiles * tile_size - block_size), (0, 0), (0, 0)))
        return blocks.reshape(array.shape[0], -1, *array.shape[2:])

    number = split(jnp.arange(1, num_tokens + 1, dtype=jnp.int32)[None, :, None, None])[..., 0]  # 0 for filling
    position = jnp.broadcast_to(jnp.where(number > 0, number, NOWHERE), (batch, number.shape[1], 1))
    stop = jnp.full(position.shape[:2], NOWHERE, jnp.int32)
    fine = LevelMap(levels.levels.repeat(tiles, 2).repeat(tiles, 3), tile_size, tile_size)
    visibility = Visibility(jnp.zeros_like(stop), stop, position)
    output = attend_tiles(split(query), split(key), split(value), fine, visibility, scale=scale).output()
    output = output.reshape(batch, -1, tiles * tile_size, num_heads, head_dim)[:, :, :block_size]
    return output.reshape(batch, -1, num_heads, head_dim)[:, :num_tokens].astype(query.dtype)
