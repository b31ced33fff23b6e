"""A language model with MoBA layers in Flax NNX: built from the modules, trained on text that repeats itself."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_attn.nn import MoBAAttention, SlidingWindowAttention


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: int, attention: nnx.Module, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(size, rngs=rngs) for _ in range(2)])
        self.attention = attention
        self.mlp = nnx.Sequential(
            nnx.Linear(size, 4 * size, rngs=rngs), nnx.gelu, nnx.Linear(4 * size, size, rngs=rngs)
        )

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = hidden + self.attention(self.norms[0](hidden))
        return hidden + self.mlp(self.norms[1](hidden))


class LanguageModel(nnx.Module):
    """A window layer, which knows positions, under a MoBA layer, which looks far."""

    def __init__(self, vocabulary: int, size: int, rngs: nnx.Rngs):
        sizes = {"in_features": size, "num_heads": 4, "rngs": rngs}
        self.embed = nnx.Embed(vocabulary, size, rngs=rngs)
        near = SlidingWindowAttention(window_size=16, **sizes)
        far = MoBAAttention(block_size=16, top_k=2, key_conv_width=3, **sizes)
        self.blocks = nnx.List([Block(size, near, rngs), Block(size, far, rngs)])
        self.head = nnx.Linear(size, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [batch, sequence] -> [batch, sequence, vocabulary]
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@nnx.jit
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def mean_loss(model: LanguageModel) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    loss, gradient = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradient)
    return loss


def main(steps: int = 300, length: int = 128) -> tuple[float, float]:
    """Trains on rows whose second half repeats the first; returns the first and the last loss."""
    model = LanguageModel(vocabulary=32, size=64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        half = jax.random.randint(jax.random.key(step), (8, length // 2), 0, 32)
        losses.append(float(train_step(model, optimizer, jnp.concatenate([half, half], axis=1))))
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
