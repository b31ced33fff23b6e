"""Systems with trained parts of their own: NSA's gates and SLA's projection are arguments, so a module owns them."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_attn.systems.nsa import NSA
from sparse_attn.systems.sla import SLA


class NSALayer(nnx.Module):
    """Causal: three branches, added under gates that every token computes from itself."""

    def __init__(self, size: int, heads: int, rngs: nnx.Rngs):
        self.attention = NSA(block_size=16, top_k=2, window_size=16)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(size, (heads, size // heads), rngs=rngs) for _ in range(3)
        )
        self.gates = nnx.LinearGeneral(size, (heads, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, size // heads), size, axis=(-2, -1), rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:  # [batch, sequence, size]
        gates = nnx.sigmoid(self.gates(hidden))  # [batch, sequence, heads, 3]
        return self.out(self.attention(self.query(hidden), self.key(hidden), self.value(hidden), gates))


class SLALayer(nnx.Module):
    """Bidirectional: softmax attention to the critical blocks, linear attention through a projection to the rest."""

    def __init__(self, size: int, heads: int, rngs: nnx.Rngs):
        self.attention = SLA(density=0.25, query_block_size=16, key_block_size=16)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(size, (heads, size // heads), rngs=rngs) for _ in range(3)
        )
        self.projection = nnx.Linear(size // heads, size // heads, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.out = nnx.LinearGeneral((heads, size // heads), size, axis=(-2, -1), rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        trained = self.projection.kernel[...], self.projection.bias[...]
        return self.out(self.attention(self.query(hidden), self.key(hidden), self.value(hidden), *trained))


@nnx.jit
def train_step(layer: nnx.Module, optimizer: nnx.Optimizer, hidden: jax.Array) -> jax.Array:
    """One step towards the mean of the token and its predecessor."""
    target = (hidden + jnp.roll(hidden, 1, axis=1)) / 2
    loss, gradient = nnx.value_and_grad(lambda layer: jnp.square(layer(hidden) - target).mean())(layer)
    optimizer.update(layer, gradient)
    return loss


def main(steps: int = 100, tokens: int = 128) -> dict[str, tuple[float, float]]:
    """Trains each layer; returns its first and its last loss."""
    losses = {}
    for kind in (NSALayer, SLALayer):
        layer = kind(size=32, heads=2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(layer, optax.adamw(3e-3), wrt=nnx.Param)
        draws = (jax.random.normal(jax.random.key(step), (4, tokens, 32)) for step in range(steps))
        course = [float(train_step(layer, optimizer, hidden)) for hidden in draws]
        losses[kind.__name__] = course[0], course[-1]
        print(f"{kind.__name__}: loss {course[0]:.3f}, after {steps} steps {course[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
