"""TidalDecode: two layers look at all keys and note the best ones; all layers above them read only those.

Paper: TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (arXiv 2410.05076).
Decoding only, one query a step; prefill is dense. The first layers are dense. A selecting layer does full attention
and, from the same logits, every query head lists its top_k keys. Every other layer attends the keys of the latest list.
There are two selecting layers, an early one and one that corrects the list further up.

The list is state that passes from layer to layer, so it is an argument and a result here; it starts as None at every
decoded token.

    selection = None
    for layer in range(num_layers):
        output, selection = attention(query[layer], key[layer], value[layer], selection, layer=layer)

Defaults: first selecting layer 2, correction at layer 9 as in the authors' code (13 in their demo of Llama-3-8B), 256
keys (the paper: 128 to 256).

Where code and paper disagree: nowhere found. The authors' accuracy path (DerrickYLJ/TidalDecode at d67a1bd), which is
followed, computes all logits in every layer and masks them; here only the listed keys are read. With grouped heads
every query head has its own list, as there.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_arrays, check_attention, check_integers, check_positive
from sparse_attn.grammar import choose, score
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tokens import attend_tokens

RECIPE = Recipe(
    name="TidalDecode",
    paper="2410.05076",
    blocks="1 / 1",
    describe="none",
    score="exact logits",
    choose="per query head: top-k keys",
    when="decoding; select at two layers, reuse the list in between, dense below",
)


def _check_one_token(query: jax.Array) -> None:
    if query.shape[1] != 1:
        raise ValueError(f"query must be one token, [batch, 1, heads, head_dim], got query.shape={query.shape}")


@splits_over_mesh("bh", key_value_seq_lengths="b")
def select(
    query: jax.Array, key: jax.Array, *, top_k: int = 256, key_value_seq_lengths: jax.Array | None = None
) -> BlockSelection:
    """The top_k keys of largest q k for every query head, ties to the earlier key.

    Args:
      query, key, top_k, key_value_seq_lengths: those of `attention`.

    Returns:
      BlockSelection of single keys: indices int32 `[batch, heads, 1, top_k]` by falling logit, -1 behind the last key.
    """
    check_arrays(query, {"key": key})
    _check_one_token(query)
    check_positive("top_k", top_k)
    lengths = check_integers("key_value_seq_lengths", key_value_seq_lengths, query.shape[:1])
    scores = jax.lax.stop_gradient(score.dot(query, key))  # [batch, heads, 1, keys]: tokens are blocks of one
    if lengths is not None:
        is_real = jnp.arange(key.shape[1])[None, :] < lengths[:, None]  # [batch, keys]
        scores = jnp.where(is_real[:, None, None], scores, -jnp.inf)
    return BlockSelection(choose.top_k_indices(scores, top_k), block_size=1, num_blocks=key.shape[1])


@splits_over_mesh(("b.h", "bh"), selection="bh", key_value_seq_lengths="b")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection | None,
    *,
    layer: int,
    top_k: int = 256,
    first_selecting_layer: int = 2,
    correction_layer: int = 9,
    scale: float | None = None,
    key_value_seq_lengths: jax.Array | None = None,
) -> tuple[jax.Array, BlockSelection | None]:
    """One layer's attention of the decoded token, softmax(scale q K^T) V, over all keys or over the list.

    Args:
      query: `[batch, 1, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype, the decoded token's own key included; heads is a
        multiple of kv_heads.
      value: shaped like key.
      selection: what the layer below returned; None at the first.
      layer: which layer this is, from 0.
      top_k: keys in a list, at least 1.
      first_selecting_layer: layers below it are dense.
      correction_layer: makes a new list.
      scale: factor of the logits, above 0. None: 1 / sqrt(head_dim).
      key_value_seq_lengths: int `[batch]`, keys there are so far; what lies behind them in a cache is never read. With
        it one compiled program serves all tokens.

    Returns:
      Array of query's shape and dtype, and the selection for the layer above: a new one from a selecting layer (whose
      own output is full attention), else the one given.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; a layer that reads a list was given None.
    """
    scale = check_attention(query, key, value, scale)
    _check_one_token(query)
    lengths = check_integers("key_value_seq_lengths", key_value_seq_lengths, query.shape[:1])
    if layer >= first_selecting_layer:
        if layer not in (first_selecting_layer, correction_layer):
            if selection is None:
                raise ValueError(f"selection must be that of a selecting layer, got None at {layer=}")
            partial = attend_tokens(query, key, value, selection.indices, scale=scale)
            return partial.output().astype(query.dtype), selection
        selection = select(query, key, top_k=top_k, key_value_seq_lengths=lengths)
    if lengths is not None:  # a probability of zero would not keep NaN out
        is_real = jnp.arange(key.shape[1])[None, :] < lengths[:, None]  # [batch, keys]
        key, value = (jnp.where(is_real[..., None, None], array, 0) for array in (key, value))
    output = jax.nn.dot_product_attention(query, key, value, scale=scale, key_value_seq_lengths=lengths)
    return output, selection
