"""The same module in Flax Linen, through NNX's bridge."""

import flax.linen as nn
import jax
from flax import nnx

from sparse_attn.nn import MoBAAttention


class Block(nn.Module):
    """x + attention(norm(x)), in Linen."""

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:  # [batch, sequence, features]
        sizes = {"in_features": hidden.shape[-1], "num_heads": 4, "block_size": 16, "top_k": 2, "key_conv_width": 3}
        attention = nnx.bridge.to_linen(MoBAAttention, name="attention", **sizes)
        return hidden + attention(nn.RMSNorm()(hidden))


def main(tokens: int = 256) -> jax.Array:
    """Initialises the block and applies it."""
    hidden = jax.random.normal(jax.random.key(0), (2, tokens, 64))
    variables = Block().init(jax.random.key(1), hidden)
    print(jax.tree.map(lambda array: array.shape, variables["params"]))
    return Block().apply(variables, hidden)


if __name__ == "__main__":
    print(main().shape)
