"""Runs everything on eight CPU devices, rows over four and heads over two, and prints what came of it.

python -m tests.sharded prints a JSON object: kind of mesh -> name -> [largest difference from one device, collectives].
A process of its own, since JAX counts its devices once. Differences and collectives are those of output and gradients;
of systems whose gradient is that of `sparse_attn.tiles` alone, and on Explicit meshes, where all systems go through one
`jax.shard_map`, those of the output: compiling takes the time here.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_attn import block_sparse_attention, moba_attention, nn, route_moba, sliding_window_attention
from tests.every_system import TOKENS, every_system

KINDS = (AxisType.Auto, AxisType.Explicit)
OWN_GRADIENTS = ("moba", "xattention", "combiner", "nsa", "pisa", "rectified", "sla", "tidal_decode")
COLLECTIVES = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def functions(query, key):
    """Name -> function of query, key and value: the library's public functions besides the systems."""
    ids = jnp.repeat(jnp.arange(3), TOKENS // 3)[None].repeat(query.shape[0], 0)
    lengths = jnp.array([TOKENS, 17, 30, 0])
    selection = route_moba(query, key, block_size=8, top_k=2)
    return {
        "moba, segments": lambda q, k, v: moba_attention(
            q, k, v, block_size=8, top_k=2, query_segment_ids=ids, key_value_segment_ids=ids
        ),
        "moba, lengths, reference": lambda q, k, v: moba_attention(
            q, k, v, block_size=8, top_k=2, key_value_seq_lengths=lengths, implementation="reference"
        ),
        "a choice given": lambda q, k, v: block_sparse_attention(q, k, v, selection),
        "window": lambda q, k, v: sliding_window_attention(q, k, v, window_size=8, segment_ids=ids),
        "window of several parts": lambda q, k, v: sliding_window_attention(
            *(jnp.tile(x, (1, 12, 1, 1)) for x in (q, k, v)), window_size=300
        ),
    }


def output_and_gradients(function):
    def call(*arrays):
        output, pull_back = jax.vjp(function, *arrays)
        return output, pull_back(jnp.sin(output))

    return call


def compare(function, arrays, spec, expected, kind):
    """Largest difference of function(*arrays) from what is expected, and the collectives, on a mesh of a kind."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        split = [jax.device_put(np.asarray(array), NamedSharding(mesh, spec)) for array in arrays]
        program = jax.jit(function).lower(*split).compile()
        actual = program(*split)
    difference = max(
        float(np.abs(np.asarray(one) - np.asarray(other)).max())
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    )
    return [difference, COLLECTIVES.findall(program.as_text())]


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((4, TOKENS, n, 8)), jnp.float32) for n in (4, 2, 2)]
    spec = PartitionSpec("data", None, "model")
    systems = every_system(*arrays[:2])
    result = {kind.name: {} for kind in KINDS}
    for name, function in (functions(*arrays[:2]) | systems).items():
        has_gradient = name not in systems or name in OWN_GRADIENTS
        call = output_and_gradients(function) if has_gradient else function
        expected = jax.jit(call)(*arrays)
        assert all(np.isfinite(array).all() and np.std(array) > 0 for array in jax.tree.leaves(expected)), name
        result["Auto"][name] = compare(call, arrays, spec, expected, AxisType.Auto)
        if name in systems and has_gradient:
            call, expected = function, expected[0]
        result["Explicit"][name] = compare(call, arrays, spec, expected, AxisType.Explicit)
    config = nn.TransformerConfig(
        vocab_size=16, num_layers=3, hidden_size=16, mlp_size=16, num_heads=2, head_dim=8, window_size=4, block_size=8,
        top_k=2, key_conv_width=3, layer_pattern=("sliding_window", "moba", "dense"),
    )  # fmt: skip
    model = nn.Transformer(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    tokens = [jnp.asarray(random.integers(0, 16, (4, TOKENS)))]

    def loss(state, tokens):
        return jax.nn.logsumexp(nnx.merge(graph, state)(tokens), -1).mean()

    def train(tokens):
        return jax.value_and_grad(loss)(state, tokens)

    expected = jax.jit(train)(*tokens)
    for kind in KINDS:
        result[kind.name]["transformer"] = compare(train, tokens, PartitionSpec("data"), expected, kind)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
