"""The function in place of dense attention: the same call, and a check that all blocks give the dense result."""

import jax
import jax.numpy as jnp

from sparse_attn import moba_attention, route_moba


def main(tokens: int = 4096, block_size: int = 64) -> None:
    """Attends `tokens` tokens by 8 blocks, and by all."""
    query, key, value = jax.random.normal(
        jax.random.key(0), (3, 1, tokens, 8, 64)
    )  # [batch, sequence, heads, head_dim]
    key, value = key[:, :, :2], value[:, :, :2]  # two key/value heads, four query heads on each

    sparse = moba_attention(query, key, value, block_size=block_size, top_k=8, is_causal=True)
    every_block = moba_attention(query, key, value, block_size=block_size, top_k=tokens // block_size, is_causal=True)
    dense = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    print("all blocks against dense attention:", float(jnp.abs(every_block - dense).max()))
    print("8 blocks against dense attention: ", float(jnp.abs(sparse - dense).max()))

    choice = route_moba(query, key, block_size=block_size, top_k=8, is_causal=True)
    print("blocks of the last query of head 0, its own first:", choice.indices[0, 0, -1])


if __name__ == "__main__":
    main()
