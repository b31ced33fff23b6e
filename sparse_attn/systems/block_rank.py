"""BlockRank: ranking documents in context; each one reads the instruction and itself, the query reads all."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import NOWHERE, Blocks
from sparse_attn.checks import check_integers, check_positive, check_self_attention
from sparse_attn.grammar import score
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRank(System):
    """BlockRank: ranking documents in context; each one reads the instruction and itself, the query reads all.

    Paper: Scalable In-context Ranking with Generative Models (arXiv 2510.05396). The prompt consists of blocks of equal
    length, each padded on its left: block 0 is the instruction, then come the documents, last the query. Instruction:
    causal. Document: all of the instruction, and causal inside itself. Query: everything before, and causal inside
    itself. Which document is relevant shows in the attention of the query's last tokens (`last_query_logits`,
    `document_logits`); training pulls it towards the right documents by `auxiliary_loss`, which the authors weigh by
    0.1 beside the language model's loss. Positions are the caller's: counted from the end of the instruction in every
    document, they make the order of documents irrelevant.

    Where code and paper disagree, the authors' code (nilesh2797/BlockRank at c6ddbf9) is followed: the temperature is
    0.05 (the code's docstring says 0.1), and there are two signal tokens, the first answer token and the one before it.
    Corrected: padded queries give zeros (theirs: a uniform average), a row without any positive document is left out of
    the loss (theirs: an infinite loss), a row whose signal tokens are not among the last queries gives NaN (theirs: an
    assertion).

    Attributes:
      block_size: tokens in a block; divides the number of tokens.
      num_last_queries: tokens at the end of the query block whose logits are returned, at most all of them.
      temperature: divides the attention that a document gets, above 0.
    """

    block_size: int = 160
    num_last_queries: int = 16
    temperature: float = 0.05

    paper = "2510.05396"
    is_causal = True
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("block_size", self.block_size)
        check_positive("num_last_queries", self.num_last_queries)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got temperature={self.temperature}")

    def check(self, query: jax.Array, key: jax.Array) -> None:
        check_self_attention(query, key)
        if query.shape[1] % self.block_size:
            raise ValueError(
                f"block_size must divide the {query.shape[1]} tokens of query, got block_size={self.block_size}"
            )

    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        is_valid: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Softmax attention to the real tokens of the chosen blocks, up to the query's own place.

        Args:
          query: `[batch, tokens, heads, head_dim]`.
          key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          is_valid: bool `[batch, tokens]`, False for padding inside blocks.
          segment_ids: int `[batch, tokens]`, for several prompts in a row, each of whole blocks.
          seq_lengths: int `[batch]`, tokens of each row, whole blocks; both as in `System`.

        Returns:
          Array `[batch, tokens, heads, head_dim]` of query's dtype; zeros for padding.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        arrays = query, key, value, is_valid
        return by_sequence(lambda _, *arrays: self._call(*arrays), arrays, segment_ids, seq_lengths)

    @splits_over_mesh(is_valid="b")
    def _call(  # type: ignore[override]
        self, query: jax.Array, key: jax.Array, value: jax.Array, is_valid: jax.Array
    ) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        blocks, levels, scale = self.blocks(query, key, is_valid), self._select(query, key), self.factor(query)
        partial = attend_levels(query, key, value, levels, blocks, scale=scale, implementation=self.implementation)
        return partial.output().astype(query.dtype)

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """The instruction and the own block for every block, all for the last; the same in all rows and heads."""
        block = jnp.arange(query.shape[1] // self.block_size)
        chosen = (block[None] == 0) | (block[None] == block[:, None]) | (block[:, None] == block.size - 1)
        levels = jnp.broadcast_to(chosen.astype(jnp.int8), (query.shape[0], query.shape[2], *chosen.shape))
        return LevelMap(levels, self.block_size, self.block_size)

    def blocks(self, query: jax.Array, key: jax.Array, is_valid: jax.Array) -> Blocks:
        """The mask of tokens: causal along the row, without padding."""
        if is_valid.shape != key.shape[:2] or is_valid.dtype != bool:
            raise ValueError(f"is_valid must be bool {key.shape[:2]}, got {is_valid.dtype} of shape {is_valid.shape}")
        blocks = whole_rows(query, key, block_size=self.block_size, is_causal=True)
        stop = jnp.where(is_valid, blocks.stop, 0)
        position = jnp.where(is_valid[..., None], blocks.key_position(), NOWHERE)
        return dataclasses.replace(blocks, stop=stop, position=position)

    def last_query_logits(self, query: jax.Array, key: jax.Array, is_valid: jax.Array) -> jax.Array:
        """The logits scale q k of the last queries over all keys that they see, -inf where a key is not seen.

        Args: those of the call.

        Returns:
          float32 `[batch, heads, num_last_queries, tokens]`; num_last_queries at most block_size.
        """
        query, key, _ = self._checked(query, key, key)
        blocks = self.blocks(query, key, is_valid)
        last = slice(-min(self.num_last_queries, self.block_size), None)
        is_seen = blocks.key_position()[:, None, :, 0] < blocks.stop[:, last, None]  # [batch, last queries, tokens]
        logits = self.factor(query) * score.dot(query[:, last], key)  # tokens are blocks of one
        return jnp.where(is_seen[:, None], logits, -jnp.inf)

    def document_logits(self, logits: jax.Array, labels: ArrayLike) -> jax.Array:
        """The share of attention that each document gets, over the temperature.

        The softmax of a signal token's logits over all tokens of documents, averaged over heads and the two signal
        tokens, summed over the tokens of a document.

        Args:
          logits: of `last_query_logits`.
          labels: int `[batch, tokens]`, -100 except for the answer. The signal tokens are the first token with a label
            among the last queries, and the one before.

        Returns:
          float32 `[batch, documents]`; NaN for a row whose signal tokens are not among the last queries.
        """
        batch, _, num_last, num_tokens = logits.shape
        labels = jnp.asarray(check_integers("labels", labels, (batch, num_tokens)))
        size = self.block_size
        if num_tokens % size or num_tokens < 3 * size:
            raise ValueError(f"block_size must cut {num_tokens} tokens into 3 blocks or more, got block_size={size}")
        is_answer = labels[:, -num_last:] > -100
        first = jnp.argmax(is_answer, axis=-1)  # [batch]
        is_there = is_answer.any(-1) & (first > 0)
        signal = jnp.maximum(jnp.stack([first - 1, first], axis=-1), 0)[:, None, :, None]
        rows = jnp.take_along_axis(logits, signal, axis=2)  # [batch, heads, 2, tokens]
        mass = score.softmax(rows[..., size:-size]).mean((1, 2)).reshape(batch, -1, size).sum(-1)
        return jnp.where(is_there[:, None], mass / self.temperature, jnp.nan)


def auxiliary_loss(logits: jax.Array, positives: ArrayLike) -> jax.Array:
    """InfoNCE with several positives: the mean over rows of log(sum(exp(all)) / sum(exp(positives))).

    Args:
      logits: of `BlockRank.document_logits`, `[batch, documents]`.
      positives: int `[batch, answers]`, indices of the relevant documents from 0; any other number is padding. Rows
        without a positive are left out of the mean.
    """
    batch, num_documents = logits.shape
    if jnp.ndim(positives) != 2:
        raise ValueError(f"positives must be [batch, answers], got shape {jnp.shape(positives)}")
    positives = jnp.asarray(check_integers("positives", positives, (batch, jnp.shape(positives)[1])))
    is_positive = (positives[:, :, None] == jnp.arange(num_documents)[None, None]).any(1)  # [batch, documents]
    has_positive = is_positive.any(1)
    is_positive |= ~has_positive[:, None]  # then the loss of the row is 0
    chosen = jnp.where(is_positive, logits, -jnp.inf)
    losses = jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(chosen, axis=1)
    return losses.sum() / jnp.maximum(has_positive.sum(), 1)
