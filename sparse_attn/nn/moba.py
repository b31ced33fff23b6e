"""Mixture of Block Attention as a module, and as the attention_fn of Flax's own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec

from sparse_attn.attention import Implementation, moba_attention
from sparse_attn.nn import key_conv
from sparse_attn.nn.attention import SelfAttention, default_kernel_init
from sparse_attn.sharding import put_on_mesh


class MoBAAttention(SelfAttention):
    """Self-attention in which each query chooses `top_k` blocks of keys, see `sparse_attn.moba_attention`.

    The key convolution comes before both routing and attention. No positional encoding.
    Sources: MoBA (arXiv 2502.13189), FlashMoBA (arXiv 2511.11571).

    Args:
      block_size: keys in a block, at least 1.
      top_k: blocks that a query attends, its own included, at least 1.
      is_causal: whether a token sees only tokens up to itself.
      implementation: as in `moba_attention`.
      mesh_axes: axes of the mesh of `jax.set_mesh` over which rows and heads are split for attention, for instance
        ("data", "model"); None in either place for none. Attention leaves arrays split as they come, so this is needed
        only where projections would leave them otherwise, and for the TPU kernels, which then run in a `jax.shard_map`.
        The sizes of the axes must divide the batch and num_key_value_heads.
      others: as in `SelfAttention`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        block_size: int,
        top_k: int,
        key_conv_width: int = 0,
        use_bias: bool = False,
        is_causal: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        key_conv_init: Initializer = key_conv.default_kernel_init,
        implementation: Implementation | None = None,
        mesh_axes: tuple[str | None, str | None] | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            key_conv_width=key_conv_width,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            key_conv_init=key_conv_init,
            rngs=rngs,
        )
        self.block_size = block_size
        self.top_k = top_k
        self.is_causal = is_causal
        self.implementation = implementation
        self.mesh_axes = mesh_axes

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        seq_lengths: jax.Array | None,
    ) -> jax.Array:
        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            segment_ids: jax.Array | None,
            seq_lengths: jax.Array | None,
        ) -> jax.Array:
            return moba_attention(
                query,
                key,
                value,
                block_size=self.block_size,
                top_k=self.top_k,
                is_causal=self.is_causal,
                query_seq_lengths=seq_lengths,
                key_value_seq_lengths=seq_lengths,
                query_segment_ids=segment_ids,
                key_value_segment_ids=segment_ids,
                implementation=self.implementation,
            )

        if self.mesh_axes is None:
            return attend(query, key, value, segment_ids, seq_lengths)
        rows, heads = self.mesh_axes
        each = PartitionSpec(rows, None, heads, None)
        specs = (each, each, each, PartitionSpec(rows), PartitionSpec(rows))
        query, key, value = (put_on_mesh(array, each) for array in (query, key, value))
        # The outputs of Pallas kernels do not say over which axes they vary.
        attend = jax.shard_map(attend, in_specs=specs, out_specs=each, check_vma=False)
        return attend(query, key, value, segment_ids, seq_lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class moba_attention_fn:
    """MoBA for `nnx.MultiHeadAttention(attention_fn=...)`; call that module with is_causal=True for causal attention.

    A value: two with the same arguments are equal, hash alike, and pickle, so equal models compile once.

    Args: as in `moba_attention`.

    Called with query `[..., queries, heads, head_dim]`, key and value `[..., keys, kv_heads, head_dim]` and what Flax
    passes by name. That raises ValueError for what MoBA has no meaning for: a mask (so also decoding from Flax's
    cache), a bias, dropout, a precision, sown weights.
    """

    block_size: int
    top_k: int
    implementation: Implementation | None = None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: Any = None,
        module: nnx.Module | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        unsupported = {"bias": bias, "mask": mask, "precision": precision, "module": module}
        for name, argument in unsupported.items():
            if argument is not None:
                raise ValueError(f"{name} must be None for MoBA attention, got {name} of {type(argument).__name__}")
        if dropout_rate > 0 and not deterministic:
            raise ValueError(f"dropout_rate must be 0 for MoBA attention unless deterministic, got {dropout_rate=}")
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        attend = functools.partial(
            moba_attention,
            block_size=self.block_size,
            top_k=self.top_k,
            is_causal=is_causal,
            implementation=self.implementation,
        )
        for _ in range(query.ndim - 4):  # any batch axes, as Flax has it
            attend = jax.vmap(attend)
        if query.ndim == 3:
            return attend(query[None], key[None], value[None])[0]
        return attend(query, key, value)
