"""The devices of a run: which part of the parameters and of a batch each of them holds."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.config import DistributedConfig, MeshConfig
from sparse_attn.nn import Transformer, TransformerConfig

# Mesh axis of every logical axis of the parameters. Rows of a batch are split over "data" as well: a device gathers the
# parameters of a layer when it needs them.
RULES = {"embed": "data", "heads": "model", "head_dim": None, "mlp": "model", "vocab": "model"}


def join_processes(config: DistributedConfig) -> None:
    """Makes this process one of several, before it touches a device; does nothing if no field is given.

    Raises:
      ValueError: a field is neither given nor in the environment.
    """
    if config != DistributedConfig():
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)


def make_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of all devices, of all processes; None for one device, the first.

    Raises:
      ValueError: the sizes do not multiply to the number of devices. A single process may take one of several.
    """
    size, count = config.data * config.model, jax.device_count()
    if size != count and (size > 1 or jax.process_count() > 1):
        raise ValueError(
            f"mesh.data * mesh.model must be the number of devices, {count}, got mesh.data={config.data} and "
            f"mesh.model={config.model}"
        )
    if size == 1:
        return None
    return jax.make_mesh((config.data, config.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def require_agreement(text: str) -> None:
    """Raises ValueError, in every process, unless all of them bring the same text: their configuration and data."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    if np.any(multihost_utils.process_allgather(digest) != digest):
        raise ValueError("all processes must have the same configuration and the same data, got different ones")


def parameter_shardings(config: TransformerConfig, mesh: Mesh) -> list[NamedSharding]:
    """How each parameter of a model is split, in the order of the leaves of its state.

    An axis that its mesh axis does not divide stays whole.
    """
    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(RULES.items())):
        model = nnx.eval_shape(lambda: Transformer(config, logical_axes=True, rngs=nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        specs = nnx.get_partition_spec(params)

    def divide(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        axes = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, array.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return list(map(divide, jax.tree.leaves(params), jax.tree.leaves(specs)))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, state: optax.OptState, params: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Shardings of an optimizer's state: what belongs to a parameter lies where that lies, by `params`, all else whole.

    Args:
      optimizer: the optimizer.
      state: its state, or the shapes of it.
      params: the sharding of every parameter.
      mesh: the mesh.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def local_rows(mesh: Mesh | None, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a batch that the devices of this process hold, ascending [rows]."""
    if mesh is None:
        return np.arange(batch_size)
    parts = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def split_rows(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, batch_size: int
) -> Mapping[str, np.ndarray | jax.Array]:
    """A batch whose rows are split over the mesh's axis "data"; unchanged without a mesh.

    Args:
      batch: arrays [rows, ...], either of the `local_rows` of this process or of all rows.
      mesh: the mesh.
      batch_size: rows of the whole batch, those of other processes included.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def largest(number: int, mesh: Mesh) -> jax.Array:
    """The largest number, int32 [], that any process brings, known to all. Does not wait for the devices."""
    local = np.full(len(mesh.local_devices), number, np.int32)
    everywhere = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)), local, (mesh.size,)
    )
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(everywhere)
