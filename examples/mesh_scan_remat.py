"""A model as large trainers build it: layers scanned and rematerialised, parameters and batch split over a mesh."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_attn.nn import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=64, num_layers=4, hidden_size=64, mlp_size=128, num_heads=4, head_dim=16,
    window_size=16, block_size=16, top_k=2, key_conv_width=3, scan_layers=True, remat=True,
)  # fmt: skip
# Which mesh axis splits which axis of a parameter: "embed" over "data" (FSDP), heads and features over "model".
RULES = (("embed", "data"), ("heads", "model"), ("mlp", "model"), ("vocab", "model"), ("head_dim", None))


def main(steps: int = 5, data: int = 1, model_devices: int = 1) -> list[float]:
    """Trains on a mesh of data x model_devices devices; returns the losses."""
    mesh = jax.make_mesh((data, model_devices), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        model = Transformer(CONFIG, logical_axes=True, rngs=nnx.Rngs(0))  # every parameter is made where it lies
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    print("an MLP's kernel is split as", model.layers[0].mlp.up.kernel[...].sharding.spec)

    @nnx.jit
    def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        def mean_loss(model: Transformer) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        loss, gradient = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradient)
        return loss

    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jnp.tile(jax.random.randint(jax.random.key(0), (4, 33), 0, 64), (1, 4))  # what repeats can be learnt
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        losses = [float(train_step(model, optimizer, jax.device_put(tokens, rows))) for _ in range(steps)]
    print("losses:", losses)
    return losses


if __name__ == "__main__":
    main()
