"""Compiles one training step for 16 TPU v5e chips that are not here, and prints its kernels and bytes a chip as JSON.

A program of its own: libtpu reads its environment when it is loaded. `python -m tests.tpu.train_step`.
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import train as training
from experiments.config import OptimizerConfig
from sparse_attn import nn
from sparse_attn.attend import backends

CONFIG = nn.TransformerConfig(
    num_layers=24,
    layer_pattern=("moba",),  # the other kind has no kernel and takes long to compile
    num_key_value_heads=8,
    key_conv_width=3,
    dtype="bfloat16",
    scan_layers=True,
)
BATCH, SEQUENCE = 4, 8192


def main() -> None:
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    backends.VERIFIED[devices[0].device_kind] = "pallas"  # so that the step is made of kernels
    mesh = Mesh(np.array(devices).reshape(4, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    _, make_state, train_step = training._compile(CONFIG, OptimizerConfig(), 1000, mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        step = train_step.lower(jax.eval_shape(make_state, 0), {"tokens": tokens, "targets": tokens})
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
