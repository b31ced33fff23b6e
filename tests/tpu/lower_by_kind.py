"""What None lowers to for chips that are not here, one kind of which counts as verified.

A program of its own: libtpu reads its environment when it is loaded. `python -m tests.tpu.lower_by_kind`.
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import sparse_attn
from sparse_attn.attend import backends
from sparse_attn.systems.xattention import XAttention


def attend(*arrays):
    return sparse_attn.moba_attention(*arrays, block_size=128, top_k=2, is_causal=True)


def has_kernels(function, sharding) -> bool:
    shape = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16, sharding=sharding)
    return "tpu_custom_call" in jax.jit(function).lower(shape, shape, shape).as_text()


def slope(*arrays):
    return jax.grad(lambda query: attend(query, *arrays[1:]).astype(jnp.float32).sum())(arrays[0])


def tiles(*arrays):
    return XAttention(block_size=128, implementation="pallas")(*arrays)


def main() -> None:
    chips = {name: topologies.get_topology_desc(f"{name}:2x2", "tpu").devices for name in ("v5e", "v6e")}
    backends.VERIFIED[chips["v5e"][0].device_kind] = "pallas"
    assert has_kernels(attend, SingleDeviceSharding(chips["v5e"][0]))
    assert not has_kernels(attend, SingleDeviceSharding(chips["v6e"][0]))
    spec = PartitionSpec(None, None, "heads")
    for kind in AxisType.Auto, AxisType.Explicit:
        for name, devices in chips.items():
            mesh = Mesh(np.array(devices[:2]), ("heads",), axis_types=(kind,))
            split = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
            assert has_kernels(split, NamedSharding(mesh, spec)) == (name == "v5e")
    for function in slope, tiles:  # under shard_map's default check
        mesh = Mesh(np.array(chips["v5e"][:2]), ("heads",))
        split = jax.shard_map(function, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        assert has_kernels(split, NamedSharding(mesh, spec))


if __name__ == "__main__":
    main()
