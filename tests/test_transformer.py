"""The hybrid Transformer: against NumPy in float64, stacked, rematerialised, from Linen and sharded."""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn import nn
from tests import cases, test_nn
from tests.test_nn import BLOCK, FEATURES, HEAD_DIM, HEADS, KV_HEADS, THETA, TOP_K, WINDOW

CONFIG = nn.TransformerConfig(
    vocab_size=13,
    num_layers=4,
    hidden_size=FEATURES,
    mlp_size=24,
    num_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    window_size=WINDOW,
    rope_theta=THETA,
    block_size=BLOCK,
    top_k=TOP_K,
    key_conv_width=3,
)


def draw():
    """Tokens and segment ids."""
    _, segment_ids = test_nn.draw()
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, segment_ids.shape)
    return tokens.astype(np.int32), segment_ids


def transformer_formula(weights, config, tokens, segment_ids):
    """Logits, and query, key and value of the layers without positions; fails where rounding may change a choice."""

    def norm(hidden, scale):
        return hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale["scale"]

    hidden, inputs = weights["embedding"]["embedding"][tokens], []
    for i, kind in enumerate(config.layer_kinds):
        layer = weights["layers"][i]
        normed = norm(hidden, layer["attention_norm"])
        output, *triple = test_nn.attention_formula(layer["attention"], kind, normed, segment_ids)
        inputs += [] if kind == "sliding_window" else [triple]
        hidden = hidden + output
        normed = norm(hidden, layer["mlp_norm"])
        gate, up, down = (layer["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        hidden = hidden + (normed @ gate / (1 + np.exp(-normed @ gate)) * (normed @ up)) @ down
    head = weights["embedding"]["embedding"].T if config.tie_embeddings else weights["head"]["kernel"]
    return norm(hidden, weights["norm"]) @ head, inputs


@functools.cache
def run_transformer(**options):
    """Parameters, gradients of a loss, logits and attention inputs of a model, in one compiled call."""
    graph, state = nnx.split(nn.Transformer(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0)))
    tokens, segment_ids = draw()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(state):
        model = nnx.merge(graph, state)
        logits = model(tokens, segment_ids)
        return jnp.square(logits).mean(), (logits, model.attention_inputs(tokens, segment_ids))

    gradients, (logits, inputs) = run(state)
    return nnx.to_pure_dict(state), nnx.to_pure_dict(gradients), logits, inputs


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_pattern": ("dense", "moba", "sliding_window"), "num_layers": 4, "tie_embeddings": True}],
    ids=["paper", "any_pattern"],
)
def test_transformer_equals_its_formula(options):
    weights, _, logits, inputs = run_transformer(**options)
    tokens, segment_ids = draw()
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    expected_logits, expected_inputs = transformer_formula(
        weights, dataclasses.replace(CONFIG, **options), tokens, segment_ids
    )
    assert logits.dtype == jnp.float32
    cases.assert_close(logits, expected_logits, "float32")
    test_nn.assert_trees_close(inputs, expected_inputs)


@pytest.mark.parametrize(("remat", "scan_layers"), [(True, False), (False, True)])
def test_remat_and_scan_give_the_numbers_of_the_plain_loop(remat, scan_layers):
    weights, loop_gradients, loop_logits, loop_inputs = run_transformer()
    transformer_formula(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights), CONFIG, *draw())
    _, gradients, logits, inputs = run_transformer(remat=remat, scan_layers=scan_layers)
    cases.assert_close(logits, loop_logits, "float32")
    test_nn.assert_trees_close(inputs, loop_inputs)
    layers = loop_gradients["layers"]
    if scan_layers:  # layer i of the loop is repeat i // 2 at place i % 2
        layers = {i: jax.tree.map(lambda *leaves: np.stack(leaves), layers[i], layers[i + 2]) for i in (0, 1)}
    test_nn.assert_trees_close(gradients, loop_gradients | {"layers": layers})


@pytest.mark.parametrize(
    "options",
    [{"layer_pattern": ("sliding_window", "moba", "dense"), "num_layers": 3}, {"scan_layers": True}],
    ids=["loop", "scan"],
)
def test_logits_with_a_cache_equal_the_formula_over_whole_rows(options):
    config = dataclasses.replace(CONFIG, **options)
    model = nn.Transformer(config, rngs=nnx.Rngs(0))
    tokens, _ = draw()
    expected, _ = transformer_formula(test_nn.weights_of(model.unstacked()), config, tokens, None)
    call = nnx.jit(lambda model, tokens, cache, num_new: model(tokens, cache=cache, num_new=num_new))
    cache, logits, length = model.init_cache(*tokens.shape), np.zeros_like(expected), np.zeros(len(tokens), int)
    for size, num_new in test_nn.SPLITS:
        piece = np.zeros((len(tokens), size), np.int32)
        for row, count in enumerate(num_new):
            piece[row, :count] = tokens[row, length[row] : length[row] + count]
        out, cache = call(model, piece, cache, np.array(num_new))
        for row, count in enumerate(num_new):
            logits[row, length[row] : length[row] + count] = out[row, :count]
        length += num_new
    cases.assert_close(logits, expected, "float32")


def test_every_parameter_of_the_transformer_has_a_gradient():
    _, gradients, _, _ = run_transformer()
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.any(leaf != 0), path


def test_a_bfloat16_transformer_gives_float32_logits_near_the_float32_ones():
    tokens, _ = draw()
    config = dataclasses.replace(CONFIG, layer_pattern=("dense",), num_layers=1)
    models = [
        nn.Transformer(dataclasses.replace(config, dtype=name), rngs=nnx.Rngs(0)) for name in ("float32", "bfloat16")
    ]
    plain, logits = (nnx.jit(model)(tokens) for model in models)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, plain, atol=0.1)
    inputs = nnx.eval_shape(lambda model: model.attention_inputs(tokens), models[1])
    assert {array.dtype for array in jax.tree.leaves(inputs)} == {jnp.dtype(jnp.bfloat16)}
    assert {array.dtype for array in jax.tree.leaves(nnx.state(models[1]))} == {jnp.dtype(jnp.float32)}


def test_the_transformer_works_from_linen():
    tokens, segment_ids = draw()
    config = dataclasses.replace(CONFIG, layer_pattern=("dense",), num_layers=2, remat=True, scan_layers=True)
    model = nnx.bridge.to_linen(nn.Transformer, config)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, segment_ids)

    @jax.jit
    @jax.grad
    def gradient(variables):
        return jnp.square(model.apply(variables, tokens, segment_ids)).mean()

    gradients = gradient(variables)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_parameters_are_sharded_as_their_axes_are_named():
    """On a mesh of two devices, which needs a process of its own."""
    program = """
        import dataclasses, functools
        import jax, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, PartitionSpec as P
        from sparse_attn import nn
        from tests.test_transformer import BLOCK, CONFIG, FEATURES, HEADS, TOP_K, draw, transformer_formula

        assert len(jax.devices()) == 2
        mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
        names = {"vocab": None, "embed": None, "heads": "model", "head_dim": None, "mlp": "model"}
        tokens, segment_ids = draw()
        config = dataclasses.replace(CONFIG, layer_pattern=("moba",), num_layers=2, scan_layers=True)
        predict = nnx.jit(lambda model: model(tokens, segment_ids))
        with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(names.items())):
            model = nnx.jit(lambda: nn.Transformer(config, logical_axes=True, rngs=nnx.Rngs(0)))()
            specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
            logits = predict(model)
            weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))
            weights["layers"] = [jax.tree.map(lambda leaf: leaf[i], weights["layers"][0]) for i in range(2)]
            np.testing.assert_allclose(logits, transformer_formula(weights, config, *draw())[0], atol=1e-5)
            on_each_device = functools.partial(nn.Transformer, config, mesh_axes=(None, "model"), logical_axes=True)
            model_on_each = nnx.jit(lambda: on_each_device(rngs=nnx.Rngs(0)))()
            np.testing.assert_allclose(logits, predict(model_on_each), atol=1e-5)

            @nnx.jit
            def decode(model):
                first, cache = model(tokens[:, :13], cache=model.init_cache(*tokens.shape))
                second, cache = model(tokens[:, 13:], cache=cache)
                return jax.numpy.concatenate([first, second], axis=1), cache

            expected, _ = transformer_formula(weights, config, tokens, None)
            decoded, cache = decode(model_on_each)
            np.testing.assert_allclose(decoded, expected, atol=1e-5)
            assert cache[0].key.sharding.shard_shape(cache[0].key.shape)[1] == cache[0].key.shape[1] // 2
        layer = specs["layers"][0]
        assert layer["attention"]["query"]["kernel"] == P(None, None, "model", None), layer
        assert layer["attention"]["out"]["kernel"] == P(None, "model", None, None), layer
        assert layer["attention"]["key_conv"]["kernel"] == P(None, None, "model", None), layer
        assert layer["mlp"]["down"]["kernel"] == P(None, "model", None), layer
        assert specs["head"]["kernel"] == P(None, None), specs
        kernel = model.layers[0].attention.query.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape) == (2, FEATURES, HEADS // 2, CONFIG.head_dim)
        graph, state = nnx.split(model)
        on_one_device = nnx.merge(graph, jax.device_put(state, jax.devices()[0]))
        np.testing.assert_allclose(logits, predict(on_one_device), atol=1e-5)

        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model", None))
        with jax.set_mesh(mesh):
            module = nn.MoBAAttention(
                in_features=FEATURES, num_heads=HEADS, head_dim=6, block_size=BLOCK, top_k=TOP_K,
                kernel_init=kernel_init, out_kernel_init=nnx.initializers.lecun_normal(), rngs=nnx.Rngs(0),
            )
        kernel = module.query.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape) == (FEATURES, HEADS // 2, CONFIG.head_dim)
        print("sharded")
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "sharded", done.stderr


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_layers", {"num_layers": 0}),
        ("top_k", {"top_k": 0}),
        ("key_conv_width", {"key_conv_width": -1}),
        ("rope_theta", {"rope_theta": 0.0}),
        ("norm_epsilon", {"norm_epsilon": float("nan")}),
        ("dtype", {"dtype": "float8"}),
        ("layer_pattern", {"layer_pattern": ()}),
        ("layer_pattern", {"layer_pattern": ("moba", "window")}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 5}),
        ("num_layers", {"num_layers": 3, "scan_layers": True}),
    ],
)
def test_bad_configs_are_named_S10(name, change):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(CONFIG, **change)


def test_bad_tokens_are_named_S10():
    model = nn.Transformer(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    for tokens in (np.zeros((2, 3)), np.zeros(3, np.int32)):
        with pytest.raises(ValueError, match="tokens"):
            model(tokens)
    tokens, segment_ids = draw()
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens, segment_ids, cache=model.init_cache(*tokens.shape))
    with pytest.raises(ValueError, match="num_new"):
        model(tokens, num_new=np.ones(len(tokens), int))
