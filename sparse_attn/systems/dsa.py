"""DSA, DeepSeek Sparse Attention: a small trained scorer lists the keys that all heads of a query attend."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.attend.per_key import attend_tokens
from sparse_attn.checks import check_attention, check_positive, check_scale
from sparse_attn.grammar import choose, score
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import by_sequence


class Indexer(NamedTuple):
    """What the model gives the indexer of a layer. All floating point.

    Attributes:
      query: `[batch, queries, index_heads, index_dim]`.
      key: `[batch, keys, index_dim]`.
      weight: `[batch, queries, index_heads]`.
    """

    query: jax.Array
    key: jax.Array
    weight: jax.Array

    def scores(self) -> jax.Array:
        """I_ts, float32 `[batch, queries, keys]`. A key `[batch, queries, keys, index_dim]` differs by query."""
        dtype = jnp.promote_types(self.query.dtype, jnp.float32)
        query, key, weight = (array.astype(dtype) for array in self)
        keys = "bsd" if key.ndim == 3 else "btsd"
        dots = jnp.einsum(f"bthd,{keys}->bths", query, key, precision="highest")
        return jnp.einsum("bth,bths->bts", weight, jax.nn.relu(dots), precision="highest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSA:
    """DSA: a small trained scorer lists the keys that all heads of a query attend.

    Paper: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1. The scorer, called lightning indexer, has queries and weights
    for a few heads of its own and one key for all of them: I_ts = sum_h w_th relu(q_th k_s). Every query token attends
    the `top_k` keys of largest score, the same list for all heads. The model makes the three arrays of the indexer,
    with 64 heads of 128 (its code folds the factors heads^-1/2 and head_dim^-1/2 into the weights). No gradient passes
    the choice: the indexer is trained by `indexer_loss`, which pulls its scores towards the attention of the heads.

    Code and paper: no differences found. The released code (DeepSeek-V3.2-Exp at 3b99a53) scores in float8, here in
    float32; its reference attends through a dense mask, here the listed keys alone are read; it is for inference only,
    so the loss follows the paper. The model's own attention has one key for all heads (the multi-query form of latent
    attention); here there may be any number of key/value heads. No outputs of the authors' code were at hand to compare
    with.

    Attributes:
      top_k: keys in a list, at least 1.
      is_causal: whether a query sees only keys up to its own position; positions align at the end, as in decoding.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
    """

    top_k: int = 2048
    is_causal: bool = True
    scale: float | None = None

    paper = "2512.02556"
    is_trainable = False

    def __post_init__(self) -> None:
        check_positive("top_k", self.top_k)
        check_scale(self.scale)

    def select(self, indexer: Indexer) -> BlockSelection:
        """The keys that each query attends: exact top-k, ties to the earlier key; holds the scores of a few queries.

        Args:
          indexer: its arrays.

        Returns:
          BlockSelection of single keys, one list for all heads: indices int32 `[batch, 1, queries, top_k]` by falling
          score, -1 behind where a query sees fewer keys.

        Raises:
          ValueError: the arrays do not fit one another.
        """
        query, key, weight = jax.lax.stop_gradient(indexer)
        if query.ndim != 4 or key.ndim != 3 or key.shape[::2] != query.shape[::3] or weight.shape != query.shape[:3]:
            raise ValueError(
                "indexer must have query [batch, queries, index_heads, index_dim], key [batch, keys, index_dim] and "
                f"weight [batch, queries, index_heads], got {query.shape}, {key.shape} and {weight.shape}"
            )
        num_keys = key.shape[1]

        def choose_keys(position: jax.Array, query: jax.Array, weight: jax.Array) -> jax.Array:
            scores = Indexer(query, key, weight).scores()
            if self.is_causal:
                is_seen = jnp.arange(num_keys)[None] <= position[:, None]  # [t, keys]
                scores = jnp.where(is_seen[None], scores, -jnp.inf)
            return choose.top_k_indices(scores, self.top_k)

        first, elements = num_keys - query.shape[1], query.shape[0] * query.shape[2] * num_keys
        indices = choose.by_queries(choose_keys, (query, weight), first=first, elements_per_query=elements)
        return BlockSelection(indices[:, None], block_size=1, num_blocks=num_keys)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        indexer: Indexer,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Softmax attention, softmax(scale q K^T) V, over the listed keys.

        Args:
          query: `[batch, queries, heads, head_dim]`, floating point.
          key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          indexer: its arrays for the same queries and keys.
          segment_ids, seq_lengths: of self-attention, as in `System`; known when the call is traced.

        Returns:
          Array of query's shape and dtype; zeros for a query that sees no key.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array, *indexer: jax.Array) -> jax.Array:
            return self._call(query, key, value, Indexer(*indexer))

        return by_sequence(call, (query, key, value, *indexer), segment_ids, seq_lengths)

    @splits_over_mesh(indexer="b")
    def _call(self, query: jax.Array, key: jax.Array, value: jax.Array, indexer: Indexer) -> jax.Array:
        scale = check_attention(query, key, value, self.scale)
        if indexer.query.shape[:2] != query.shape[:2] or indexer.key.shape[:2] != key.shape[:2]:
            shapes = indexer.query.shape, indexer.key.shape
            raise ValueError(f"indexer must fit query {query.shape} and key {key.shape}, got query and key {shapes}")
        indices = self.select(indexer).indices
        return attend_tokens(query, key, value, indices, scale=scale).output().astype(query.dtype)

    def indexer_loss(self, query: jax.Array, key: jax.Array, indexer: Indexer, selection: BlockSelection) -> jax.Array:
        """KL(p_t || softmax(I_t)) over each query's list, where p_t is the heads' mean attention to the listed keys.

        Its gradient goes to the indexer alone. With lists of all visible keys it is the loss of the dense warm-up.

        Args:
          query, key, indexer: as in the call.
          selection: what `select` gives.

        Returns:
          float32 `[batch, queries]` in nats, 0 for an empty list; the paper adds up the queries.
        """
        scale = check_attention(query, key, key, self.scale)
        query, key = jax.lax.stop_gradient((query, key))
        batch, num_keys, kv_heads, head_dim = key.shape
        dtype = jnp.promote_types(query.dtype, jnp.float32)

        @jax.checkpoint
        def diverge(_: jax.Array, *arrays: jax.Array) -> jax.Array:
            query, index_query, weight, indices = arrays  # [batch, t, ...]
            place, is_listed = jnp.maximum(indices, 0).reshape(batch, -1, 1), indices >= 0  # indices [batch, t, list]

            def gather(array: jax.Array) -> jax.Array:  # [batch, keys, x] -> [batch, t, list, x]
                return jnp.take_along_axis(array, place, axis=1).reshape(*indices.shape, -1)

            keys = gather(key.reshape(batch, num_keys, -1)).reshape(*indices.shape, kv_heads, head_dim).astype(dtype)
            grouped = query.astype(dtype).reshape(batch, -1, kv_heads, query.shape[2] // kv_heads, head_dim)
            logits = scale * jnp.einsum("btkgd,btskd->btkgs", grouped, keys, precision="highest")
            target = score.softmax(logits, is_listed[:, :, None, None]).mean((2, 3))  # [batch, t, list]
            scores = Indexer(index_query, gather(indexer.key), weight).scores()
            log_predicted = jax.nn.log_softmax(jnp.where(is_listed, scores, -1e30))
            log_target = jnp.log(jnp.where(target > 0, target, 1))
            return jnp.where(target > 0, target * (log_target - log_predicted), 0).sum(-1)

        arrays = query, indexer.query, indexer.weight, selection.indices[:, 0]
        return choose.by_queries(diverge, arrays, elements_per_query=batch * arrays[-1].shape[-1] * kv_heads * head_dim)
