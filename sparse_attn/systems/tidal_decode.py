"""TidalDecode: two layers look at all keys and note the best ones; all layers above them read only those."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.per_key import attend_tokens
from sparse_attn.checks import (
    check_arrays,
    check_attention,
    check_integers,
    check_not_negative,
    check_positive,
    check_scale,
)
from sparse_attn.grammar import choose, score
from sparse_attn.layout import zero_padding
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import splits_over_mesh


def _check_one_token(query: jax.Array) -> None:
    if query.shape[1] != 1:
        raise ValueError(f"query must be one token, [batch, 1, heads, head_dim], got query.shape={query.shape}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TidalDecode:
    """TidalDecode: two layers look at all keys and note the best ones; all layers above them read only those.

    Paper: TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (arXiv 2410.05076).
    Decoding only, one query a step; prefill is dense. The first layers are dense. A selecting layer does full attention
    and, from the same logits, every query head lists its top_k keys. Every other layer attends the keys of the latest
    list. There are two selecting layers, an early one and one that corrects the list further up.

    The list is state that passes from layer to layer, so it is an argument and a result of the call; it starts as None
    at every decoded token.

        attention, selection = TidalDecode(), None
        for layer in range(num_layers):
            output, selection = attention(query[layer], key[layer], value[layer], selection, layer=layer)

    Code and paper: no differences found. The authors' accuracy path (DerrickYLJ/TidalDecode at d67a1bd), which is
    followed, computes all logits in every layer and masks them; here only the listed keys are read. With grouped heads
    every query head has its own list, as there.

    Attributes:
      top_k: keys in a list, at least 1; the paper has 128 to 256.
      first_selecting_layer: layers below it are dense.
      correction_layer: makes a new list: 9 in the authors' code, 13 in their demo of Llama-3-8B.
      scale: factor of the logits, above 0, for the list is by q k alone. None: 1 / sqrt(head_dim).
    """

    top_k: int = 256
    first_selecting_layer: int = 2
    correction_layer: int = 9
    scale: float | None = None

    paper = "2410.05076"
    is_causal = True
    is_trainable = False

    def __post_init__(self) -> None:
        check_positive("top_k", self.top_k)
        check_not_negative("first_selecting_layer", self.first_selecting_layer)
        check_not_negative("correction_layer", self.correction_layer)
        check_scale(self.scale)

    @splits_over_mesh("bh", key_value_seq_lengths="b")
    def select(
        self, query: jax.Array, key: jax.Array, *, key_value_seq_lengths: jax.Array | None = None
    ) -> BlockSelection:
        """The top_k keys of largest q k for every query head, ties to the earlier key. Args: those of the call.

        Returns:
          BlockSelection of single keys: indices int32 `[batch, heads, 1, top_k]` by falling logit, -1 behind the last
          key.
        """
        check_arrays(query, {"key": key})
        _check_one_token(query)
        lengths = check_integers("key_value_seq_lengths", key_value_seq_lengths, query.shape[:1])
        scores = jax.lax.stop_gradient(score.dot(query, key))  # [batch, heads, 1, keys]: tokens are blocks of one
        if lengths is not None:
            is_real = jnp.arange(key.shape[1])[None, :] < lengths[:, None]  # [batch, keys]
            scores = jnp.where(is_real[:, None, None], scores, -jnp.inf)
        return BlockSelection(choose.top_k_indices(scores, self.top_k), block_size=1, num_blocks=key.shape[1])

    @splits_over_mesh(("b.h", "bh"), selection="bh", key_value_seq_lengths="b")
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        selection: BlockSelection | None,
        *,
        layer: int,
        key_value_seq_lengths: jax.Array | None = None,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> tuple[jax.Array, BlockSelection | None]:
        """One layer's attention of the decoded token, softmax(scale q K^T) V, over all keys or over the list.

        Args:
          query: `[batch, 1, heads, head_dim]`.
          key: `[batch, keys, kv_heads, head_dim]`, of query's dtype, the decoded token's own key included; heads is a
            multiple of kv_heads.
          value: shaped like key.
          selection: what the layer below returned; None at the first.
          layer: which layer this is, from 0.
          key_value_seq_lengths: int `[batch]`, keys there are so far; what lies behind them in a cache is never read.
            With it one compiled program serves all tokens.
          segment_ids, seq_lengths: refused: they describe rows of self-attention, and here one token is decoded.

        Returns:
          Array of query's shape and dtype, and the selection for the layer above: a new one from a selecting layer
          (whose own output is full attention), else the one given.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value; a layer that reads a list was given None.
        """
        if segment_ids is not None or seq_lengths is not None:
            raise ValueError(
                "segment_ids and seq_lengths are those of self-attention, but one token is decoded here: give "
                "key_value_seq_lengths"
            )
        scale = check_attention(query, key, value, self.scale)
        _check_one_token(query)
        lengths = check_integers("key_value_seq_lengths", key_value_seq_lengths, query.shape[:1])
        if layer >= self.first_selecting_layer:
            if layer not in (self.first_selecting_layer, self.correction_layer):
                if selection is None:
                    raise ValueError(f"selection must be that of a selecting layer, got None at {layer=}")
                partial = attend_tokens(query, key, value, selection.indices, scale=scale)
                return partial.output().astype(query.dtype), selection
            selection = self.select(query, key, key_value_seq_lengths=lengths)
        key, value = (zero_padding(array, lengths) for array in (key, value))  # a weight of zero keeps no NaN out
        output = jax.nn.dot_product_attention(query, key, value, scale=scale, key_value_seq_lengths=lengths)
        return output, selection
