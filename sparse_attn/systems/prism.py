"""Prism: block means scored in two bands of rotary frequencies, each with its own temperature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_positive, check_whole_blocks
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.grammar.grid import Grid
from sparse_attn.selection import LevelMap
from sparse_attn.systems.system import System


def band_of(array: jax.Array, size: int, *, is_high: bool) -> jax.Array:
    """The `size` features that turn fastest, or slowest, of `[..., head_dim]` in the half-split layout of rotary pairs.

    Feature i turns with feature i + head_dim / 2, the slower the larger i.
    """
    half, pairs = array.shape[-1] // 2, size // 2
    start = 0 if is_high else half - pairs
    return jnp.concatenate(
        [array[..., start : start + pairs], array[..., half + start : half + start + pairs]], axis=-1
    )


def band_probability(
    query_mean: jax.Array,
    key_mean: jax.Array,
    can_choose: jax.Array,
    *,
    size: int,
    is_high: bool,
    temperature: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax over key blocks in one band, and its temperature.

    Args:
      query_mean: float32 `[batch, query_blocks, heads, head_dim]`.
      key_mean: float32 `[batch, key_blocks, kv_heads, head_dim]`.
      can_choose: bool, broadcasts to the result.
      size: features of the band.
      is_high: whether it is the fast one.
      temperature: None for tau_z.

    Returns:
      float32 `[batch, heads, query_blocks, key_blocks]` and float32 `[batch, heads, 1, 1]`.
    """

    def rms(array: jax.Array) -> jax.Array:  # [batch, blocks, heads, x] -> [batch, heads]
        return jnp.sqrt(jnp.square(array).mean((1, 3)))

    query, key = (band_of(array, size, is_high=is_high) for array in (query_mean, key_mean))
    fading = (rms(key) / rms(key_mean)).repeat(query.shape[2] // key.shape[2], axis=1)
    tau = (size / query_mean.shape[-1]) ** 0.5 * rms(query) / rms(query_mean) * fading
    tau = (tau if temperature is None else jnp.full_like(tau, temperature))[:, :, None, None]
    return score.softmax(score.dot(query, key) / (size**0.5 * tau), can_choose), tau


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prism(System):
    """Prism: block means scored in two bands of rotary frequencies, each with its own temperature.

    Paper: Prism: Spectral-Aware Block-Sparse Attention (arXiv 2602.08426). Training-free prefill of models with rotary
    positions. The mean over a block wipes out pairs of features that turn fast, so that a dot product of means no
    longer tells where a block lies. The head's features are therefore cut into a high band of fast pairs and a low band
    of slow ones, which overlap; block means are compared in each, softmax(Q_z K_z^T / (sqrt(d_z) tau_z)) over earlier
    blocks, with tau_z = sqrt(d_z / d) (rms Q_z / rms Q) (rms K_z / rms K), so that a faded band is sharpened. Each band
    takes the shortest prefix whose mass reaches its threshold; the union of both, the first block and the diagonal are
    attended. Queries and keys come with rotary positions applied, in the half-split layout; keys may be longer than
    queries by whole blocks.

    Code and paper: no differences found; the authors' code (xinghaow99/prism at d5a4252) is followed, in which the mean
    of a short last block counts zeros for what is missing. Other scripts of theirs have thresholds of 0.93 and 0.92.
    Decoding is dense there: a caller's matter.

    Attributes:
      high_size: features of the band that turns fast, even.
      low_size: features of the band that turns slowly, even; the bands may overlap.
      high_threshold: share of the mass that is kept in the high band, between 0 and 1.
      low_threshold: the same in the low band.
      block_size: tokens in a block of queries or keys; the last may be shorter.
      temperatures: of the high and the low band, instead of tau_z.
      keep_first: whether the first block is forced.
      keep_diagonal: whether the diagonal is; a query without any key in its chosen blocks gives zeros.
    """

    high_size: int = 64
    low_size: int = 96
    high_threshold: float = 0.95
    low_threshold: float = 0.95
    block_size: int = 128
    temperatures: tuple[float, float] | None = None
    keep_first: bool = True
    keep_diagonal: bool = True

    paper = "2602.08426"
    is_causal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)
        for name in ("high_size", "low_size"):
            size = getattr(self, name)
            check_positive(name, size)
            if size % 2:
                raise ValueError(f"{name} must be even, got {name}={size}")

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_whole_blocks(query, key, self.block_size)
        for name in ("high_size", "low_size"):
            if getattr(self, name) > query.shape[-1]:
                size = getattr(self, name)
                raise ValueError(f"{name} must be at most head_dim={query.shape[-1]}, got {name}={size}")

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        grid = Grid.of(query, key, self.block_size, is_causal=True)
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        query_mean, key_mean = (split_blocks(array.astype(dtype), self.block_size).mean(2) for array in (query, key))
        band = functools.partial(band_probability, query_mean, key_mean, jnp.asarray(grid.visible))
        high, low = self.temperatures or (None, None)
        fast, _ = band(size=self.high_size, is_high=True, temperature=high)
        slow, _ = band(size=self.low_size, is_high=False, temperature=low)
        chosen = choose.top_p(fast, self.high_threshold) | choose.top_p(slow, self.low_threshold)
        return grid.choose(chosen | (self.keep_first & grid.first) | (self.keep_diagonal & grid.diagonal))
