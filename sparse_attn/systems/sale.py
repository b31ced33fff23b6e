"""SALE: logits are estimated in 4 bits; a tile counts if one of them weighs enough beside what is attended anyway."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_attention, check_not_negative, check_positive
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.layout import visible_tiles, whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence


def quantise(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """n = round(7 x / max_d |x|), half to even, int8 `[..., head_dim]`; its step max_d |x| / 7, float32 `[...]`."""
    largest = jnp.abs(array).max(-1)
    return jnp.round(7 * array / jnp.where(largest > 0, largest, 1)[..., None]).astype(jnp.int8), largest / 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class SALE(System):
    """SALE: logits are estimated in 4 bits; a tile counts if one of them weighs enough beside what is attended anyway.

    Paper: SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (arXiv 2505.24179).
    Training-free, for causal prefill of whole prompts. Always attended are the first key block and the last
    `local_window` keys up to the end of the query block; L_t is the log-sum-exp of their logits for query t. Queries
    and keys lose their mean over the prompt and are rounded, each token with a step of its own (`quantise`), to n_t and
    n_s:

        x_ts = scale (step_t step_s (n_t n_s) + mean q (k_s - mean k)),      n_t n_s exact, in integers

    estimates the logit, and exp(x_ts - L_t) is the Relative Attention Score (the authors write exp(x - m) / l with the
    softmax's running maximum and sum). A tile is attended exactly if any of its scores is above the head's threshold.

        thresholds = sale.calibrate(query, key, value)      # of examples of one layer
        output = sale(query, key, value, thresholds)

    Code and paper (BirdChristopher/SALE at ec20815): the code centres the queries too, which is followed. Its
    quant_mode 2 has steps per token, as here; mode 3 shares them between the tokens that one GPU thread holds. Its
    two-pass mode fixes L_t before tiles are judged, as here; in the other mode L_t grows with the tiles. It extends the
    local window by up to 3 key blocks, for whole segments, and keeps steps in 16 bits; here they are float32. The
    default threshold is the example in its readme. Its kernels need a GPU with 4-bit tensor cores: no outputs of theirs
    were at hand to compare with.

    Attributes:
      threshold: least Relative Attention Score, at least 0; 0 keeps everything.
      local_window: keys up to the end of a query block that are always attended, at least a query block.
      dense_length: prompts of at most that many tokens attend everything.
      query_block_size: queries in a block; the last may be shorter.
      key_block_size: keys in a block; the last may be shorter.
    """

    threshold: float = 0.004
    local_window: int = 128
    dense_length: int = 1024
    query_block_size: int = 64
    key_block_size: int = 32

    paper = "2505.24179"
    is_causal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("query_block_size", self.query_block_size)
        check_positive("key_block_size", self.key_block_size)
        check_not_negative("dense_length", self.dense_length)
        if self.local_window < self.query_block_size:
            raise ValueError(
                f"local_window must hold a query block of {self.query_block_size}, got local_window={self.local_window}"
            )
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be a number of at least 0, got threshold={self.threshold}")

    @splits_over_mesh("bh", thresholds="h")
    def select(self, query: jax.Array, key: jax.Array, thresholds: ArrayLike | None = None) -> LevelMap:
        """The tiles that are attended, without a gradient; arguments as of the call."""
        query, key = map(jnp.asarray, (query, key))
        self.check(query, key)
        return self._select(*jax.lax.stop_gradient((query, key)), thresholds)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        thresholds: ArrayLike | None = None,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Causal softmax attention over the tiles that `select` keeps.

        Args:
          query, key, value, segment_ids, seq_lengths: as in `System.__call__`, with as many keys as queries.
          thresholds: float `[heads]`, one for each head instead of `threshold`.

        Returns:
          Array `[batch, queries, heads, head_dim]` of query's dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, thresholds)

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    def calibrate(self, query: jax.Array, key: jax.Array, value: jax.Array, *, error: float = 0.4) -> jax.Array:
        """One layer's thresholds, float32 `[heads]`, from examples of one length, the rows of query, key and value.

        Each starts at 0.008 and halves until the L1 error of the head's output, averaged over tokens, is below `error`
        in every example; at 1e-4 it becomes 0, which is dense.
        """
        exact = self(query, key, value, jnp.zeros(query.shape[2]))

        def halve(_: int, thresholds: jax.Array) -> jax.Array:
            output = self(query, key, value, thresholds)
            distance = jnp.abs(output.astype(jnp.float32) - exact.astype(jnp.float32)).sum(-1)  # [batch, tokens, heads]
            half = jnp.where(thresholds / 2 > 1e-4, thresholds / 2, 0)
            return jnp.where((distance.mean(1) < error).all(0), thresholds, half)

        return jax.lax.fori_loop(0, 7, halve, jnp.full(query.shape[2], 0.008))

    def scores(self, query: jax.Array, key: jax.Array, forced: LevelMap) -> jax.Array:
        """log of the largest Relative Attention Score, max (x_ts - L_t), of every tile, causality aside.

        query and key as in `select`; forced has level 1 where a tile is attended anyway. Holds the estimates of one
        query block at a time. float32 `[batch, heads, query_blocks, key_blocks]`.
        """
        batch, num_tokens, num_heads, head_dim = query.shape
        kv_heads, scale = key.shape[2], self.factor(query)
        query, key = (array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in (query, key))
        mean = query.mean(1).reshape(batch, kv_heads, -1, head_dim)
        smooth = key - key.mean(1, keepdims=True)
        reference = self._attend(query, smooth, smooth, forced).log_sum_exp()  # L_t
        fill = ((0, 0), (0, -num_tokens % self.query_block_size), (0, 0))
        reference = jnp.pad(reference, fill, constant_values=jnp.inf)  # [batch, tokens, heads]: no token, no score
        smooth = jnp.pad(smooth, ((0, 0), (0, -num_tokens % self.key_block_size), (0, 0), (0, 0)))
        key_numbers, key_step = quantise(smooth)
        of_mean = jnp.einsum("bkgd,bskd->bkgs", mean, smooth, precision="highest")[:, :, :, None]
        key_step = key_step.swapaxes(1, 2)[:, :, None, None]  # [batch, kv_heads, 1, 1, keys]

        def score_block(block: tuple[jax.Array, ...]) -> jax.Array:
            numbers, step, reference = (
                array.reshape(*array.shape[:2], kv_heads, -1, *array.shape[3:]) for array in block
            )
            step, reference = (jnp.moveaxis(array, 1, 3)[..., None] for array in (step, reference))  # [b, k, g, t, 1]
            product = jnp.einsum("btkgd,bskd->bkgts", numbers, key_numbers, preferred_element_type=jnp.int32)
            excess = scale * (step * key_step * product + of_mean) - reference
            return excess.reshape(batch, num_heads, self.query_block_size, -1, self.key_block_size).max((2, 4))

        centred = query - query.mean(1, keepdims=True)
        of_tokens = (*quantise(centred), reference)
        blocks = (split_blocks(array, self.query_block_size).swapaxes(0, 1) for array in of_tokens)
        return jnp.moveaxis(jax.lax.map(score_block, tuple(blocks)), 0, 2)

    @splits_over_mesh(thresholds="h")
    def _call(
        self, query: jax.Array, key: jax.Array, value: jax.Array, thresholds: ArrayLike | None = None
    ) -> jax.Array:
        query, key, value = map(jnp.asarray, (query, key, value))
        check_attention(query, key, value, self.scale)
        levels = self.select(query, key, thresholds)
        return self._attend(query, key, value, levels).output().astype(query.dtype)

    def _select(self, query: jax.Array, key: jax.Array, thresholds: ArrayLike | None = None) -> LevelMap:
        batch, num_tokens, num_heads, _ = query.shape
        limit = jnp.asarray(self.threshold if thresholds is None else thresholds, jnp.float32)
        if thresholds is not None and limit.shape != (num_heads,):
            raise ValueError(f"thresholds must be [{num_heads} heads], got thresholds.shape={limit.shape}")
        blocks = whole_rows(query, key, block_size=self.key_block_size, is_causal=True)
        visible = visible_tiles(blocks, self.query_block_size)
        visible = jnp.broadcast_to(visible, (batch, num_heads, *visible.shape[2:]))

        def to_levels(chosen: jax.Array) -> LevelMap:
            return LevelMap((visible & chosen).astype(jnp.int8), self.query_block_size, self.key_block_size)

        if num_tokens <= self.dense_length:
            return to_levels(visible)
        end = self.key_block_size * (jnp.arange(visible.shape[3]) + 1)
        start = self.query_block_size * (jnp.arange(visible.shape[2]) + 1) - self.local_window  # of the local window
        forced = (end > start[:, None]) | (end == self.key_block_size)  # [query_blocks, key_blocks]
        scores = self.scores(query, key, to_levels(forced))
        return to_levels(forced | (scores > jnp.log(limit).reshape(1, -1, 1, 1)))
