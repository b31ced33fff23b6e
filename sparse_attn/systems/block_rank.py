"""BlockRank: ranking documents in context; each one reads the instruction and itself, the query reads all.

Paper: Scalable In-context Ranking with Generative Models (arXiv 2510.05396). The prompt is blocks of equal length, each
padded on its left: 0 the instruction, then the documents, last the query. Instruction: causal. Document: all of the
instruction, and causal inside itself. Query: everything before, causal inside itself. Which document is relevant shows
in the attention of the query's last tokens (`last_query_logits`, `document_logits`), in training pulled towards the
right documents by `auxiliary_loss`, which the authors weigh 0.1 beside the language model's loss. Positions are the
caller's: counted anew from the end of the instruction in every document, they make the order of documents irrelevant.

Where code and paper disagree, the authors' code (nilesh2797/BlockRank at c6ddbf9) is followed: the temperature is 0.05
(the code's docstring names 0.1), and two signal tokens speak, the first answer token and the one before it. Corrected:
padded queries give zeros (the authors': a uniform average), a row without any positive document is left out of the loss
(an infinite loss), a row whose signal tokens are not among the last queries gives NaN (an assertion).
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_integers, check_positive, check_self_attention
from sparse_attn.grammar import score
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import NOWHERE, Visibility, make_visibility

RECIPE = Recipe(
    name="BlockRank",
    paper="2510.05396",
    blocks="160 / 160, one a document, padded",
    describe="none",
    score="none",
    choose="fixed: the instruction and the own block, causal; the last block sees all",
    is_trainable=True,
)


@splits_over_mesh("bh")
def select(query: jax.Array, key: jax.Array, *, block_size: int = 160) -> LevelMap:
    """Instruction and own block for every block, all for the last; in all rows and heads. Args: as in `attention`."""
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    batch, num_tokens, num_heads, _ = query.shape
    if num_tokens % block_size:
        raise ValueError(f"block_size must divide the {num_tokens} tokens of query, got block_size={block_size}")
    block = jnp.arange(num_tokens // block_size)
    chosen = (block[None] == 0) | (block[None] == block[:, None]) | (block[:, None] == block.size - 1)
    levels = jnp.broadcast_to(chosen.astype(jnp.int8), (batch, num_heads, *chosen.shape))
    return LevelMap(levels, block_size, block_size)


def _visibility(query: jax.Array, key: jax.Array, is_valid: jax.Array) -> Visibility:
    """Causal along the row, without padding."""
    if is_valid.shape != key.shape[:2] or is_valid.dtype != bool:
        raise ValueError(f"is_valid must be bool {key.shape[:2]}, got {is_valid.dtype} of shape {is_valid.shape}")
    visibility = make_visibility(query, key, is_causal=True)
    stop = jnp.where(is_valid, visibility.stop, 0)
    return Visibility(visibility.start, stop, jnp.where(is_valid[..., None], visibility.position, NOWHERE))


@splits_over_mesh(is_valid="b")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_valid: jax.Array,
    *,
    block_size: int = 160,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, over the real tokens of the chosen blocks up to the query's own place.

    Args:
      query: `[batch, tokens, heads, head_dim]`.
      key, value: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      is_valid: bool `[batch, tokens]`, False for padding.
      block_size: tokens in a block; divides tokens.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype; zeros for padding.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(query, key, block_size=block_size)
    visibility = _visibility(query, key, is_valid)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)


def last_query_logits(
    query: jax.Array,
    key: jax.Array,
    is_valid: jax.Array,
    *,
    block_size: int = 160,
    num_last_queries: int = 16,
    scale: float | None = None,
) -> jax.Array:
    """The logits scale q k of the query block's last tokens, at most all of them, over all keys that they see.

    float32 `[batch, heads, last queries, tokens]`, -inf where a key is not seen. Args: those of `attention`.
    """
    scale = check_attention(query, key, key, scale)
    check_positive("num_last_queries", num_last_queries)
    select(query, key, block_size=block_size)  # for its checks
    start, stop, position = _visibility(query, key, is_valid)
    last = slice(-min(num_last_queries, block_size), None)
    is_seen = (start[:, last, None] <= position[:, None, :, 0]) & (position[:, None, :, 0] < stop[:, last, None])
    logits = scale * score.dot(query[:, last], key)  # tokens are blocks of one
    return jnp.where(is_seen[:, None], logits, -jnp.inf)


def document_logits(
    logits: jax.Array, labels: jax.Array, *, block_size: int = 160, temperature: float = 0.05
) -> jax.Array:
    """The share of attention that each document gets, over the temperature: the softmax of a signal token's logits over
    all tokens of documents, averaged over heads and the two signal tokens, summed over the tokens of a document.

    Args:
      logits: of `last_query_logits`.
      labels: int `[batch, tokens]`, -100 but for the answer. Signal tokens: the first token with a label among
        the last queries, and the one before.
      block_size, temperature: tokens in a block; above 0.

    Returns:
      float32 `[batch, documents]`; NaN for a row whose signal tokens are not among the last queries.
    """
    batch, _, num_last, num_tokens = logits.shape
    check_integers("labels", labels, (batch, num_tokens))
    check_positive("block_size", block_size)
    if num_tokens % block_size or num_tokens < 3 * block_size or not temperature > 0:
        raise ValueError(
            f"block_size must cut {num_tokens} tokens into 3 blocks or more and temperature be above 0, got "
            f"{block_size=}, {temperature=}"
        )
    is_answer = labels[:, -num_last:] > -100
    first = jnp.argmax(is_answer, axis=-1)  # [batch]
    is_there = is_answer.any(-1) & (first > 0)
    signal = jnp.maximum(jnp.stack([first - 1, first], axis=-1), 0)[:, None, :, None]
    rows = jnp.take_along_axis(logits, signal, axis=2)  # [batch, heads, 2, tokens]
    mass = score.softmax(rows[..., block_size:-block_size]).mean((1, 2)).reshape(batch, -1, block_size).sum(-1)
    return jnp.where(is_there[:, None], mass / temperature, jnp.nan)


def auxiliary_loss(logits: jax.Array, positives: jax.Array) -> jax.Array:
    """InfoNCE with several positives: the mean over rows of log(sum(exp(all)) / sum(exp(positives))).

    Args:
      logits: of `document_logits`, `[batch, documents]`.
      positives: int `[batch, answers]`, indices of the relevant documents from 0; any other number is padding. Rows
        without a positive are left out of the mean.
    """
    batch, num_documents = logits.shape
    if positives.ndim != 2:
        raise ValueError(f"positives must be [batch, answers], got shape {positives.shape}")
    check_integers("positives", positives, (batch, positives.shape[1]))
    is_positive = (positives[:, :, None] == jnp.arange(num_documents)[None, None]).any(1)  # [batch, documents]
    has_positive = is_positive.any(1)
    is_positive |= ~has_positive[:, None]  # then the loss of the row is 0
    chosen = jnp.where(is_positive, logits, -jnp.inf)
    losses = jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(chosen, axis=1)
    return losses.sum() / jnp.maximum(has_positive.sum(), 1)
