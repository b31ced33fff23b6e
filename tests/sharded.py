"""Runs everything on eight CPU devices, rows over four and heads over two, and prints what came of it.

python -m tests.sharded prints a JSON object: name -> kind of mesh -> [largest difference, collectives]. A process of
its own, since JAX counts its devices once. Compiling takes the time here. So functions of the library are compared with
one device, in output and gradients; systems on a mesh of Auto axes, which XLA splits, with those on Explicit axes,
which `jax.shard_map` splits, and in gradients where these are not those of `sparse_attn.tiles` alone.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_attn import block_sparse_attention, moba_attention, nn, route_moba, sliding_window_attention
from sparse_attn.dense import Dense
from sparse_attn.systems.moba import MoBA
from sparse_attn.window import SlidingWindow
from tests.every_system import TOKENS, every_system

KINDS = (AxisType.Auto, AxisType.Explicit)
OWN_GRADIENTS = ("moba", "nsa", "sla", "xattention")
IN_SHARD_MAP = ("window", "moba", "xattention", "sla")
CACHED = {
    "moba": MoBA(block_size=8, top_k=2), "window": SlidingWindow(window_size=8), "dense": Dense(),
}  # fmt: skip
COLLECTIVES = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def functions(query, key):
    """Name -> function of query, key and value: the library's public functions besides the systems."""
    ids = jnp.repeat(jnp.arange(3), TOKENS // 3)[None].repeat(query.shape[0], 0)
    lengths = jnp.array([TOKENS, 17, 30, 0])[: query.shape[0]]
    selection = route_moba(query, key, block_size=8, top_k=2, is_causal=True)
    return {
        "moba, segments": lambda q, k, v: moba_attention(
            q, k, v, block_size=8, top_k=2, is_causal=True, segment_ids=ids
        ),
        "moba, lengths, reference": lambda q, k, v: moba_attention(
            q, k, v, block_size=8, top_k=2, is_causal=True, seq_lengths=lengths, implementation="reference"
        ),
        "a choice given": lambda q, k, v: block_sparse_attention(q, k, v, selection, is_causal=True),
        "window": lambda q, k, v: sliding_window_attention(q, k, v, window_size=8, segment_ids=ids),
        "window of several parts": lambda q, k, v: sliding_window_attention(
            *(jnp.tile(x, (1, 12, 1, 1)) for x in (q, k, v)), window_size=300
        ),
    }


def cached(attention):
    """Attention of queries, keys and values through a cache: a chunk, then two single tokens."""

    def attend(query, key, value):
        batch, tokens, kv_heads, head_dim = key.shape
        cache, outputs = attention.init_cache(batch, tokens, kv_heads, head_dim, key_conv_width=3), []
        kernel = jnp.ones((3, kv_heads, head_dim), key.dtype) / 8
        for part in (slice(0, tokens - 2), slice(tokens - 2, tokens - 1), slice(tokens - 1, tokens)):
            new = (array[:, part] for array in (query, key, value))
            output, cache = attention.attend_cached(*new, cache, key_conv_kernel=kernel)
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    return attend


def output_and_gradients(function):
    def call(*arrays):
        output, pull_back = jax.vjp(function, *arrays)
        return output, pull_back(jnp.sin(output))

    return call


def run(function, arrays, spec, kind):
    """function(*arrays) on a mesh of a kind, and the collectives in its program."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        split = [jax.device_put(np.asarray(array), NamedSharding(mesh, spec)) for array in arrays]
        program = jax.jit(function).lower(*split).compile()
        return jax.tree.map(np.asarray, program(*split)), COLLECTIVES.findall(program.as_text())


def compare(name, function, arrays, spec, has_own_program):
    """Kind of mesh -> largest difference of function(*arrays) from one device or Auto axes, and the collectives."""
    on_mesh = {kind.name: run(function, arrays, spec, kind) for kind in KINDS}
    expected = jax.jit(function)(*arrays) if has_own_program else on_mesh["Auto"][0]
    assert all(np.isfinite(array).all() and np.any(array) for array in jax.tree.leaves(expected)), name

    def difference(actual):
        differences = jax.tree.map(lambda one, other: np.abs(one - other).max(), actual, expected)
        return float(max(jax.tree.leaves(differences)))

    return {kind: [difference(results), collectives] for kind, (results, collectives) in on_mesh.items()}


def in_shard_map(function, arrays):
    """Largest difference of output and gradients in a `jax.shard_map` over rows, the values of all rows the same."""
    query, key, value = arrays
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")
    split = jax.shard_map(function, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows)

    def row_by_row(query, key, value):
        return jax.vmap(lambda query, key: function(query[None], key[None], value)[0])(query, key)

    actual, expected = (jax.jit(output_and_gradients(f))(query, key, value[:1]) for f in (split, row_by_row))
    differences = jax.tree.map(lambda one, other: np.abs(np.asarray(one) - np.asarray(other)).max(), actual, expected)
    return [float(max(jax.tree.leaves(differences))), []]


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((4, TOKENS, n, 8)), jnp.float32) for n in (4, 2, 2)]
    spec = PartitionSpec("data", None, "model")
    systems = every_system(*arrays[:2])
    result = {}
    for name, function in (functions(*arrays[:2]) | systems).items():
        has_gradient = name not in systems or name in OWN_GRADIENTS
        call = output_and_gradients(function) if has_gradient else function
        result[name] = compare(name, call, arrays, spec, name not in systems)
    for name, attention in CACHED.items():
        result[f"{name}, cached"] = compare(name, cached(attention), arrays, spec, True)
    one_row = arrays[0][:1], arrays[1][:1]
    for name in IN_SHARD_MAP:
        function = (functions(*one_row) | every_system(*one_row))[name]
        result[f"{name}, in shard_map"] = {"Manual": in_shard_map(function, arrays)}
    split = jax.shard_map(
        cached(CACHED["moba"]), mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"),
    )  # fmt: skip
    actual, expected = (jax.jit(function)(*arrays) for function in (split, cached(CACHED["moba"])))
    result["moba, cached, in shard_map"] = {"Manual": [float(jnp.abs(np.asarray(actual) - expected).max()), []]}
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

    result["transformer"] = compare("transformer", train, tokens, PartitionSpec("data"), True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
