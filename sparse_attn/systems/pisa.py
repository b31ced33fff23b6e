"""PISA: the best blocks exactly, all others by their mean key, their values and one correction of first order."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn.attend.partial import Partial, merge
from sparse_attn.checks import check_positive, check_share
from sparse_attn.grammar import choose, rest, score
from sparse_attn.grammar.describe import block_lengths, block_mean, split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System


def describe(key: jax.Array, value: jax.Array, *, block_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What blocks are known by, float32: mean keys and values `[batch, key_blocks, kv_heads, head_dim]`, and first
    moments H_j, `[batch, key_blocks, kv_heads, head_dim, head_dim]`. Args: those of `PISA`.
    """
    key_mean, value_mean = block_mean(key, block_size), block_mean(value, block_size)
    centred = split_blocks(key.astype(key_mean.dtype), block_size) - key_mean[:, :, None]
    values = split_blocks(value.astype(key_mean.dtype), block_size)  # zero behind the last token
    # Axes: j blocks, s keys of a block, k key/value heads, d and e features.
    return key_mean, value_mean, jnp.einsum("bjskd,bjske->bjkde", centred, values, precision="highest")


def score_blocks(
    query: jax.Array, key_mean: jax.Array, moments: jax.Array | None, *, block_size: int, scale: float
) -> jax.Array:
    """scale mean(q) k_j; with moments the softmax over j of that plus log(norm(H_j) + 1e-5), Frobenius norm.

    float32 `[batch, heads, query_blocks, key_blocks]`. Args: those of `PISA`, and what `describe` gives.
    """
    scores = scale * score.dot(block_mean(query, block_size), key_mean)
    if moments is None:
        return scores
    norm = jnp.sqrt(jnp.square(moments).sum((-2, -1))).swapaxes(1, 2)  # [batch, kv_heads, key_blocks]
    bias = jnp.log(norm + 1e-5).repeat(query.shape[2] // norm.shape[1], axis=1)
    return score.softmax(scores + bias[:, :, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PISA(System):
    """PISA: the best blocks exactly, all others by their mean key, their values and one correction of first order.

    Paper: PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers (arXiv 2602.01077).
    Training-free and bidirectional. Query blocks score key blocks by the dot product of their means; the best share is
    attended exactly. The attention of any other block of n_j keys is expanded around its mean key k_j:
    n_j exp(scale q k_j) joins the normaliser, exp(scale q k_j) sum(v) the sum of values, and the first-order term
    scale q H_j exp(scale q k_j), with H_j = sum (k - k_j)^T v, is averaged over the row: scale q (sum_j H_j / tokens)
    times the whole mass of the tail.

    The default density is that of the authors' function (0.15 in their readme, 0.125 for video). Tokens come in an
    order in which blocks are patches: 8 x 8 tiles for images, `order.boxes((1, height, width), (8, 8))`. The first 10
    to 15 denoising steps and the first layer are dense there: a caller's matter.

    Where code and paper disagree, the authors' code (xie-lab-ml/piecewise-sparse-attention at 8604494) is followed:
    `use_moment_norm` ranks by the norm of H_j (paper: of its distance from the mean H), and the average of the H_j runs
    over all blocks, the exact ones too. One error of theirs is corrected: their kernel reads the mean keys in groups
    and does not rescale the tail's mass when a later group raises the running maximum.

    Attributes:
      density: share of the key blocks that is attended exactly, between 0 and 1, rounded down; one block at least.
      block_size: tokens in a block; the last may be shorter.
      use_moment_norm: rank by the norm of the first moments too, as the authors do for images.
    """

    density: float = 0.1
    block_size: int = 64
    use_moment_norm: bool = False

    paper = "2602.01077"
    is_causal = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("density", self.density)
        check_positive("block_size", self.block_size)

    @splits_over_mesh("bh")
    def select(self, query: jax.Array, key: jax.Array, value: jax.Array | None = None) -> LevelMap:
        """The best key blocks of every query block: 1 attend exactly, 0 the tail.

        Args, besides those of `System`:
          value: shaped like key; needed with use_moment_norm, and without effect otherwise.
        """
        if value is None and self.use_moment_norm:
            raise ValueError("value must be given with use_moment_norm=True, which ranks by moments of the values")
        arrays = self._checked(query, key, key if value is None else value)
        return self._select(*jax.lax.stop_gradient(arrays))

    @splits_over_mesh()
    def _call(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        levels = self._select(*jax.lax.stop_gradient((query, key, value)))
        return self._attend(query, key, value, levels).output().astype(query.dtype)

    def _select(self, query: jax.Array, key: jax.Array, value: jax.Array) -> LevelMap:  # type: ignore[override]
        size = self.block_size
        moments = describe(key, value, block_size=size)[2] if self.use_moment_norm else None
        scores = score_blocks(query, block_mean(key, size), moments, block_size=size, scale=self.factor(query))
        chosen = choose.top_k(scores, max(1, int(self.density * scores.shape[-1])))
        return LevelMap(chosen.astype(jnp.int8), size, size)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        """Exact attention to the chosen blocks and a piecewise expansion of all others, in one normaliser."""
        key_mean, value_mean, moments = describe(key, value, block_size=self.block_size)
        tail = self._tail(query, key, key_mean, value_mean, levels)
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3]).astype(moments.dtype)
        slope = jnp.einsum("btkgd,bkde->btkge", grouped, moments.sum(1), precision="highest").reshape(query.shape)
        first_order = (self.factor(query) / key.shape[1]) * tail.total[..., None] * slope
        tail = tail._replace(accumulator=tail.accumulator + first_order)
        return merge(super()._attend(query, key, value, levels), tail)

    def _tail(
        self, query: jax.Array, key: jax.Array, key_mean: jax.Array, value_mean: jax.Array, levels: LevelMap
    ) -> Partial:
        """The expansion to zeroth order: mean keys and values `[batch, key_blocks, kv_heads, head_dim]`."""
        size, is_tail = self.block_size, levels.levels == 0
        log_count = jnp.log(block_lengths(key.shape[1], size))[None]
        scale = self.factor(query)
        return rest.pooled(query, key_mean, value_mean, log_count, is_tail, query_block_size=size, scale=scale)
