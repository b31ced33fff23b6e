"""What the library computes, written for reading: dense masks, one line for each rule. Every other path must equal it.

S1  Arrays are [batch, sequence, heads, head_dim]. Tokens of equal segment id form one segment; a row without ids is
    one segment; tokens at or past the row's sequence length are padding and belong to none.
S2  Keys are cut, segment by segment, into blocks of `block_size`. Causal: a query's own block is always chosen and
    counts as one of `top_k`; blocks wholly in the future are never chosen. `top_k` at or above the number of blocks
    is dense attention.
S3  The router's score is the dot product of the query with the mean of the block's keys, unscaled. The best blocks
    win, ties go to the lower block index. The choice carries no gradient and the scores are not gates.
S4  Query head h reads key/value head h // (heads / kv_heads) and chooses for itself.
S5  With n_q queries and n_k keys in a segment, the query of rank r stands at the key of rank r + n_k - n_q. A causal
    call with as many queries as keys and with lengths of keys alone is self-attention: queries have the same lengths.
S6  Any length: the last block of a segment may be short, and a mean runs over the keys that are there.
S7  Batch rows and segments never influence each other, nor does padding, whatever it holds.
S8  Means, scores, softmax and accumulators are float32 (float64 for float64 input); the output has the query's dtype.
S9  A query with nothing to attend to gives zeros and zero gradients.
S10 Bad arguments are a ValueError at trace time (`sparse_attn.attention`).

Sources: MoBA (arXiv 2502.13189), section 2; FlashMoBA (arXiv 2511.11571), section 2. Where implementations
differ (S2 for `top_k=1`, S3 for ties, S5), the sentence above decides.

Names of einsum axes: b batch, t queries, s keys, k key/value heads, g query heads of one key/value head, n blocks,
d head_dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from sparse_attn.attend.choice import PerQuery


def block_means(key: jax.Array, blocks: Blocks) -> jax.Array:
    """Mean key of every block (S3, S6).

    Args:
      key: `[batch, keys, kv_heads, head_dim]` in block order, padding zero.
      blocks: geometry of the batch.

    Returns:
      float32 `[batch, blocks, kv_heads, head_dim]`; zero for a block that does not exist.
    """
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    block = jnp.arange(blocks.num_blocks)[None, :, None]
    is_member = blocks.block_of_key()[:, None, :] == block  # [batch, blocks, keys]
    total = jnp.einsum("bns,bskd->bnkd", is_member.astype(key.dtype), key, precision="highest")
    return total / jnp.maximum(blocks.block_length, 1)[..., None, None]


def route(query: jax.Array, key: jax.Array, blocks: Blocks, *, top_k: int, is_causal: bool) -> jax.Array:
    """Which blocks each query chooses (S2 to S4).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` in block order, padding zero.
      blocks: geometry of the batch.
      top_k: blocks a query may choose, at most the number of blocks where that is known.
      is_causal: whether the own block is forced.

    Returns:
      int32 `[batch, heads, queries, top_k]`: the own block first (causal), then by falling score; -1 for none.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    means = block_means(key, blocks)
    query = query.reshape(batch, num_queries, key.shape[2], -1, head_dim).astype(means.dtype)
    scores = jnp.einsum("btkgd,bnkd->bkgtn", query, means, precision="highest")
    scores = scores.reshape(batch, num_heads, num_queries, blocks.num_blocks)
    block = jnp.arange(blocks.num_blocks)[None, None, :]
    first, last = blocks.first_block[..., None], blocks.last_block[..., None]  # [batch, queries, 1]
    is_visible = (first <= block) & (block <= last)  # [batch, queries, blocks]
    scores = jnp.where(is_visible[:, None], scores, -jnp.inf)
    if is_causal:
        scores = jnp.where((is_visible & (block == last))[:, None], jnp.inf, scores)
    scores = jnp.where(scores == 0, 0, scores)  # top_k would put 0 above -0
    if not isinstance(blocks.num_blocks, int):  # of symbolic size: there may be fewer than top_k
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, top_k)), constant_values=-jnp.inf)
    best, indices = jax.lax.top_k(scores, top_k)  # stable: the lower index wins a tie
    return jnp.where(best == -jnp.inf, -1, indices)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, blocks: Blocks, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the keys of the chosen blocks that a query may see: softmax(scale q k + mask) v.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` in block order, padding zero.
      value: shaped like key.
      indices: int32 `[batch, heads, queries, top_k]`, the chosen blocks, -1 for none.
      blocks: geometry of the batch.
      scale: factor of the logits.

    Returns:
      Output like query, and the log-sum-exp of the logits, float32 `[batch, queries, heads]`, -inf for none.
    """
    mask = PerQuery(indices, blocks).mask()
    output, log_sum_exp = masked_attention(query, key, value, mask, scale=scale)
    return output.astype(query.dtype), log_sum_exp


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    key_log_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k + key_log_weight) v over the true entries of a mask, S8 and S9 kept, in plain JAX.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      value: `[batch, keys, kv_heads, value_head_dim]`.
      mask: bool `[batch, heads, queries, keys]`.
      scale: factor of the logits.
      key_log_weight: float32 `[batch, keys, kv_heads]`, added to the logits.

    Returns:
      Output `[batch, queries, heads, value_head_dim]` and log-sum-exp of the logits `[batch, queries, heads]`, -inf for
      none;
      both float32 (float64 for float64).
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    accumulator = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, num_queries, kv_heads, num_heads // kv_heads, head_dim).astype(accumulator)
    logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key.astype(accumulator))
    if key_log_weight is not None:
        logits += key_log_weight.astype(accumulator).swapaxes(1, 2)[:, :, None, None]
    logits = jnp.where(mask, logits.reshape(mask.shape), -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weight = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
    total = weight.sum(-1, keepdims=True)
    is_empty = total == 0  # S9
    total = jnp.where(is_empty, 1, total)
    probability = (weight / total).reshape(batch, kv_heads, num_heads // kv_heads, num_queries, num_keys)
    output = jnp.einsum("bkgts,bskd->btkgd", probability, value.astype(accumulator))
    log_sum_exp = jnp.where(is_empty, -jnp.inf, jnp.log(total) + largest)[..., 0]  # [batch, heads, queries]
    return output.reshape(*query.shape[:3], -1), log_sum_exp.swapaxes(1, 2)
