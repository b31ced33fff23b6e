"""MoBA as the attention_fn of Flax's own module."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype

from sparse_attn.attend.backends import Implementation
from sparse_attn.attention import moba_attention


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
        return attend(query, key, value)
