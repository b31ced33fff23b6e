"""A diffusion transformer for video, trained; its layers attend boxes of time, of space, of both in turn (VMoBA)."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_attn.nn import SelfAttention
from sparse_attn.systems.vmoba import VMoBA


class DiTBlock(nnx.Module):
    """Attention and MLP whose norms are shifted, scaled and gated by the noise level, as in DiT (arXiv 2212.09748)."""

    def __init__(self, size: int, attention: VMoBA, rngs: nnx.Rngs):
        self.attention = SelfAttention(attention=attention, in_features=size, num_heads=2, rngs=rngs)
        up, down = nnx.Linear(size, 2 * size, rngs=rngs), nnx.Linear(2 * size, size, rngs=rngs)
        self.mlp = nnx.Sequential(up, nnx.gelu, down)
        self.norm = nnx.LayerNorm(size, use_bias=False, use_scale=False, rngs=rngs)
        self.modulation = nnx.Linear(size, 6 * size, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, hidden: jax.Array, level: jax.Array) -> jax.Array:  # [batch, tokens, size], [batch, size]
        shift, scale, gate, shift2, scale2, gate2 = jnp.split(self.modulation(nnx.silu(level))[:, None], 6, axis=-1)
        hidden = hidden + gate * self.attention(self.norm(hidden) * (1 + scale) + shift)
        return hidden + gate2 * self.mlp(self.norm(hidden) * (1 + scale2) + shift2)


class VideoTransformer(nnx.Module):
    """Predicts the clean video from a noisy one."""

    def __init__(self, grid: tuple[int, int, int], size: int, rngs: nnx.Rngs):
        frames, height, width = grid
        boxes = [(frames // 2,), (height // 2, width // 2), (frames // 2, height // 2, width // 2)]
        layers = [VMoBA(grid_shape=grid, box_shape=box, threshold=0.5) for box in boxes]  # 1-D, 2-D, 3-D in turn
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (frames * height * width, size)))
        self.embed, self.level = nnx.Linear(1, size, rngs=rngs), nnx.Linear(1, size, rngs=rngs)
        self.blocks = nnx.List([DiTBlock(size, layer, rngs) for layer in layers])
        self.head = nnx.Linear(size, 1, rngs=rngs)

    def __call__(self, noisy: jax.Array, level: jax.Array) -> jax.Array:  # [batch, tokens, 1], [batch, 1]
        hidden, level = self.embed(noisy) + self.place[...], self.level(level)
        for block in self.blocks:
            hidden = block(hidden, level)
        return self.head(hidden)


@nnx.jit
def train_step(model: VideoTransformer, optimizer: nnx.Optimizer, video: jax.Array, key: jax.Array) -> jax.Array:
    noise_key, level_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (video.shape[0], 1))
    noisy = (1 - level[:, None]) * video + level[:, None] * jax.random.normal(noise_key, video.shape)
    loss, gradient = nnx.value_and_grad(lambda model: jnp.square(model(noisy, level) - video).mean())(model)
    optimizer.update(model, gradient)
    return loss


def main(steps: int = 100, grid: tuple[int, int, int] = (4, 8, 8)) -> tuple[float, float]:
    """Trains on videos of a wave that moves; returns the error before and after."""
    model = VideoTransformer(grid, size=32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    time, row, column = jnp.meshgrid(*map(jnp.arange, grid), indexing="ij")

    def wave(phase: float) -> jax.Array:  # [batch, tokens, 1]
        return jnp.sin(time + row / 2 + column / 3 + phase).reshape(1, -1, 1).repeat(8, 0)

    levels, noise = jnp.linspace(0, 1, 8)[:, None], jax.random.normal(jax.random.key(1), (8, time.size, 1))

    @nnx.jit
    def error(model: VideoTransformer) -> jax.Array:  # for one video at eight levels of noise
        return jnp.square(model(wave(0.0) + levels[:, None] * (noise - wave(0.0)), levels) - wave(0.0)).mean()

    before = float(error(model))
    for step in range(steps):
        train_step(model, optimizer, wave(0.7 * step), jax.random.key(step))
    return before, float(error(model))


if __name__ == "__main__":
    print("error before and after:", main())
