"""Compiles one training step for 16 TPU v5e chips that are not here, and prints its kernels and bytes a chip as JSON.

A program of its own: libtpu reads its environment when it is loaded. `python -m tests.tpu.train_step`.
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.config import OptimizerConfig
from experiments.train import make_optimizer
from sparse_attn import nn

CONFIG = nn.TransformerConfig(
    num_layers=24,
    layer_pattern=("moba",),  # the other kind has no kernel and takes long to compile
    num_key_value_heads=8,
    key_conv_width=3,
    dtype="bfloat16",
    scan_layers=True,
)
BATCH, SEQUENCE = 4, 8192
RULES = {"vocab": "model", "embed": None, "heads": "model", "head_dim": None, "mlp": "model"}


# The library asks for the machine that it runs on; it is to answer for the chips that are compiled for.
jax.default_backend = lambda: "tpu"


def main() -> None:
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    mesh = Mesh(np.array(devices).reshape(4, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer, _ = make_optimizer(OptimizerConfig(), steps=1000)

    def make_model() -> nn.Transformer:
        return nn.Transformer(
            CONFIG, logical_axes=True, mesh_axes=("data", "model"), implementation="pallas", rngs=nnx.Rngs(0)
        )

    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(RULES.items())):
        graph, params = nnx.split(nnx.eval_shape(make_model), nnx.Param)
        specs = nnx.get_partition_spec(params)

    def place(array: jax.ShapeDtypeStruct, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))

    optimizer_state = jax.eval_shape(optimizer.init, params)
    optimizer_state = optax.tree_map_params(optimizer, place, optimizer_state, specs, transform_non_params=place)
    params = jax.tree.map(place, params, specs)
    tokens = place(jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32), PartitionSpec("data", None))

    def mean_loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens)  # [batch, sequence, vocab_size]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def train_step(params: nnx.State, state: optax.OptState, tokens: jax.Array) -> tuple:
        loss, gradient = jax.value_and_grad(mean_loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.set_mesh(mesh):
        step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, optimizer_state, tokens)
        memory = step.compile().memory_analysis()
    print(
        json.dumps(
            {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "code": memory.generated_code_size_in_bytes,
                "kernels": sorted(set(re.findall(r'kernel_name = "(\w+)"', step.as_text()))),
            }
        )
    )


if __name__ == "__main__":
    main()
