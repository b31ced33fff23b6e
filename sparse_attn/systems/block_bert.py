"""BlockBERT: every head lets a block of queries attend one block of keys, by a fixed permutation of the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocks import NOWHERE
from sparse_attn.attend.partial import Partial
from sparse_attn.checks import check_self_attention
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System

_LARGEST_TILE = 128  # bounds the logits that are alive; a block is cut into equal tiles of at most so many tokens


def shifts(heads_per_shift: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """One permutation a head: first `heads_per_shift[0]` heads of the identity, then those of the shift by one, ...

    A shift by s of n = len(heads_per_shift) blocks sends block i to i + s modulo n.

    Example: `shifts((2, 1))` is `((0, 1), (0, 1), (1, 0))`.
    """
    n = len(heads_per_shift)
    return tuple(
        tuple((block + shift) % n for block in range(n))
        for shift, heads in enumerate(heads_per_shift)
        for _ in range(heads)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockBERT(System):
    """BlockBERT: every head lets a block of queries attend one block of keys, by a fixed permutation of the blocks.

    Paper: Blockwise Self-Attention for Long Document Understanding (arXiv 1911.02972). The sequence is cut into n equal
    blocks. Head h has a permutation p_h of them: block i of the queries attends block p_h(i) of the keys,
    bidirectionally. The identity is local attention; the others are shifts and carry what is far away. Time and memory
    of attention fall by n. For pre-training and fine-tuning BERT; nothing is scored. Keys are not repeated: the heads
    of a group read different blocks of the same keys.

    Defaults: n = 2 with ten heads of the identity and two of the shift by one (for n = 3 take `shifts((8, 2, 2))`).
    These splits of BERT-base's twelve heads are quoted from memory of the paper, unchecked.

    Code and paper: no code is public. Decided here: blocks have ceil(tokens / n) tokens, so that the last may be
    shorter.

    Attributes:
      permutations: for each head the key block of query block 0, 1, ..., n - 1; see `shifts`.
    """

    permutations: tuple[tuple[int, ...], ...] = shifts((10, 2))

    paper = "1911.02972"
    is_causal = False
    is_trainable = True
    whole = "h"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.permutations or any(sorted(row) != list(range(self._num_blocks)) for row in self.permutations):
            raise ValueError(
                "permutations must hold one permutation of 0, 1, ..., n - 1 for each head, got "
                f"permutations={self.permutations}"
            )

    @property
    def _num_blocks(self) -> int:
        return len(self.permutations[0])

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_self_attention(query, key)
        _, num_tokens, num_heads, _ = query.shape
        if len(self.permutations) != num_heads:
            raise ValueError(
                f"permutations must hold one for each of query's {num_heads} heads, got {len(self.permutations)}"
            )
        if -(-num_tokens // -(-num_tokens // self._num_blocks)) != self._num_blocks:
            raise ValueError(
                f"permutations of {self._num_blocks} blocks leave some of them empty with {num_tokens} tokens"
            )

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        levels = np.eye(self._num_blocks, dtype=np.int8)[np.array(self.permutations)]  # [heads, query and key blocks]
        block_size = -(-query.shape[1] // self._num_blocks)
        return LevelMap(jnp.broadcast_to(levels[None], (query.shape[0], *levels.shape)), block_size, block_size)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        """Exact attention over the choice, in tiles that are smaller than a block."""
        batch, num_tokens = query.shape[:2]
        block_size = levels.query_block_size
        tiles = -(-block_size // _LARGEST_TILE)
        tile_size = -(-block_size // tiles)

        def split(array: jax.Array) -> jax.Array:
            """Fills up every block of `[batch, tokens, heads, x]` to whole tiles, with zeros."""
            blocks = split_blocks(array, block_size)
            blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, tiles * tile_size - block_size), (0, 0), (0, 0)))
            return blocks.reshape(array.shape[0], -1, *array.shape[2:])

        def join(array: jax.Array) -> jax.Array:
            """Undoes `split`."""
            blocks = array.reshape(batch, -1, tiles * tile_size, *array.shape[2:])[:, :, :block_size]
            return blocks.reshape(batch, -1, *array.shape[2:])[:, :num_tokens]

        number = split(jnp.arange(1, num_tokens + 1, dtype=jnp.int32)[None, :, None, None])[..., 0]  # 0 for filling
        query, key, value = map(split, (query, key, value))
        blocks = whole_rows(query, key, block_size=tile_size, is_causal=False)
        position = jnp.where(number > 0, number - 1, NOWHERE)
        blocks = dataclasses.replace(blocks, position=jnp.broadcast_to(position, (batch, *position.shape[1:])))
        fine = LevelMap(levels.levels.repeat(tiles, 2).repeat(tiles, 3), tile_size, tile_size)
        scale, implementation = self.factor(query), self.implementation
        partial = attend_levels(query, key, value, fine, blocks, scale=scale, implementation=implementation)
        return Partial(*map(join, partial))
