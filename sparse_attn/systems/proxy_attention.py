"""ProxyAttn: one proxy head ranks the blocks for a whole group of heads; every head has a budget of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_positive
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyAttention(System):
    """ProxyAttn: one proxy head ranks the blocks for a whole group of heads; every head has a budget of its own.

    Paper: ProxyAttn: Guided Sparse Attention via Representative Heads (arXiv 2509.24745). Training-free causal prefill.
    The heads of a group, which is made of whole groups of key/value heads, are averaged into one proxy query and key;
    one token in `stride` is kept. The largest softmax weight of the proxy in every pair of blocks ranks the key blocks
    of a query block. How many blocks head h keeps is found once: the real attention of its last query block, summed
    over key blocks, says how many of them hold the mass; every query block keeps as many, and at least `min_tokens`.

    Code and paper: unknown, since neither was at hand, only notes and reviews of the paper. Decided here: a query block
    that sees fewer blocks than its budget attends all of them, the diagonal is always attended and counts, strides
    count from the start of the row, and the block size. Four proxy heads are used for Qwen2.5-7B-1M.

    Attributes:
      num_proxies: groups of heads that share a ranking, a divisor of kv_heads.
      stride: the proxy sees one token in so many, a divisor of block_size.
      mass: share of the last query block's attention that a head's budget of blocks must hold, between 0 and 1.
      min_tokens: smallest budget, in tokens.
      block_size: tokens in a block of queries or keys; the last may be shorter.
    """

    num_proxies: int = 1
    stride: int = 4
    mass: float = 0.95
    min_tokens: int = 2048
    block_size: int = 128

    paper = "2509.24745"
    is_causal = True
    whole = "h"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_proxies", "stride", "block_size"):
            check_positive(name, getattr(self, name))
        if self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size={self.block_size}, got stride={self.stride}")

    def check(self, query: jax.Array, key: jax.Array) -> None:
        super().check(query, key)
        if key.shape[2] % self.num_proxies:
            raise ValueError(
                f"num_proxies must divide the {key.shape[2]} heads of key, got num_proxies={self.num_proxies}"
            )

    def scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Largest softmax weight of a proxy head in every pair of blocks: float32 `[batch, proxies, blocks, blocks]`.

        query and key as in `select`. The weights of one query block are alive at once.
        """
        batch, num_tokens, _, head_dim = query.shape
        scale, dtype = self.factor(query), jnp.promote_types(query.dtype, jnp.float32)

        def proxy(array: jax.Array) -> jax.Array:  # [batch, blocks, kept tokens of a block, proxies, head_dim]
            array = array.astype(dtype).reshape(batch, num_tokens, self.num_proxies, -1, head_dim).mean(3)
            return split_blocks(array, self.block_size)[:, :, :: self.stride]

        query, key = proxy(query), proxy(key)
        place = jnp.arange(query.shape[1] * self.block_size).reshape(-1, self.block_size)[:, :: self.stride]

        def score_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            query, row = block  # [batch, kept tokens, proxies, head_dim], [kept tokens]
            # Axes: p proxies, t kept queries, j key blocks, m kept keys of a block.
            logits = scale * jnp.einsum("btpd,bjmpd->bptjm", query, key, precision="highest")
            is_seen = (place <= row[:, None, None]) & (row < num_tokens)[:, None, None]
            weights = score.softmax(logits.reshape(*logits.shape[:3], -1), is_seen.reshape(row.size, -1))
            return weights.reshape(logits.shape).max((2, 4))  # [batch, proxies, key_blocks]

        return jnp.moveaxis(jax.lax.map(score_block, (query.swapaxes(0, 1), place)), 0, 2)

    def budget(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """How many key blocks a head keeps, int32 `[batch, heads]`.

        The fewest that hold `mass` of the last block_size queries' attention, and at least `min_tokens`; query and key
        as in `select`.
        """
        last = query[:, -self.block_size :]
        is_seen = jnp.tri(last.shape[1], key.shape[1], key.shape[1] - last.shape[1], dtype=bool)
        weights = score.softmax(self.factor(query) * score.dot(last, key), is_seen).sum(2)  # [batch, heads, keys]
        pooled = split_blocks(weights.swapaxes(1, 2), self.block_size).sum(2)  # [batch, blocks, heads]
        count = choose.top_p(pooled.swapaxes(1, 2), self.mass).sum(-1, dtype=jnp.int32)
        return jnp.maximum(count, -(-self.min_tokens // self.block_size))

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        grid = Grid.of(query, key, self.block_size, is_causal=True)
        scores = jnp.where(grid.visible, self.scores(query, key), -jnp.inf)
        scores = jnp.where(grid.diagonal, jnp.inf, scores).repeat(query.shape[2] // self.num_proxies, axis=1)
        return grid.choose(choose.top_k(scores, self.budget(query, key)[:, :, None, None]))
