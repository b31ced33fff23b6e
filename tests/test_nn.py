"""The Flax modules: against NumPy in float64, against each other, and inside other people's models."""

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
from flax import linen, nnx

import sparse_attn
from sparse_attn import nn
from sparse_attn.nn.sliding_window import rotate
from tests import cases, oracle
from tests.test_keys import convolve
from tests.test_window import attend as attend_window

BATCH, TOKENS, FEATURES, HEADS, KV_HEADS, HEAD_DIM = 2, 21, 12, 4, 2, 6
WINDOW, BLOCK, TOP_K, THETA = 5, 4, 2, 100.0
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
KINDS = {
    "moba": functools.partial(nn.MoBAAttention, block_size=BLOCK, top_k=TOP_K, key_conv_width=3),
    "sliding_window": functools.partial(nn.SlidingWindowAttention, window_size=WINDOW, rope_theta=THETA),
    "dense": functools.partial(nn.DenseAttention, key_conv_width=5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    sizes = {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rngs": nnx.Rngs(0)}
    return KINDS[kind](FEATURES, HEADS, **(sizes | options))


def draw(seed=0):
    """Inputs of a module, segment ids, tokens of a model."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((BATCH, TOKENS, FEATURES)).astype(np.float32)
    segment_ids = np.sort(random.integers(0, 3, (BATCH, TOKENS))).astype(np.int32)
    return inputs, segment_ids, random.integers(0, CONFIG.vocab_size, (BATCH, TOKENS)).astype(np.int32)


def weights_of(module):
    """Nested dictionary of the parameters in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))


def attention_formula(weights, kind, inputs, segment_ids):
    """Output, query and key of a module; only the choice of blocks and attention to a mask come from the oracle."""
    project = functools.partial(np.einsum, "btf,fhd->bthd", inputs)
    query, key, value = (project(weights[name]["kernel"]) for name in ("query", "key", "value"))
    if kind == "sliding_window":
        query, key = turn(query), turn(key)
        output = attend_window(query, key, value, WINDOW, segment_ids=segment_ids)
    else:
        key = convolve(key, weights["key_conv"]["kernel"], segment_ids)
        sequences = {}
        if segment_ids is not None:
            sequences = {"query_segment_ids": segment_ids, "key_value_segment_ids": segment_ids}
        top_k = TOP_K if kind == "moba" else TOKENS
        indices, gap = oracle.route(query, key, block_size=BLOCK, top_k=top_k, **sequences)
        assert gap.min() > cases.SCORE_TOLERANCE, "rounding may change a choice: take another seed"
        mask = oracle.attention_mask(indices, num_keys=TOKENS, block_size=BLOCK, **sequences)
        output = oracle.attention(query, key, value, mask)
    return np.einsum("bthd,hdf->btf", output, weights["out"]["kernel"]), query, key


def turn(array):
    """Rotary positions as products of complex numbers."""
    half = array.shape[-1] // 2
    angles = np.arange(array.shape[1])[:, None] * THETA ** (-np.arange(half) / half)
    turned = (array[..., :half] + 1j * array[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def transformer_formula(weights, config, tokens, segment_ids):
    """Logits, and query and key of the layers without positions."""

    def norm(hidden, scale):
        return hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale["scale"]

    hidden, pairs = weights["embedding"]["embedding"][tokens], []
    for i, kind in enumerate(config.layer_kinds):
        layer = weights["layers"][i]
        normed = norm(hidden, layer["attention_norm"])
        output, *pair = attention_formula(layer["attention"], kind, normed, segment_ids)
        pairs += [] if kind == "sliding_window" else [pair]
        hidden = hidden + output
        normed = norm(hidden, layer["mlp_norm"])
        gate, up, down = (layer["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        hidden = hidden + (normed @ gate / (1 + np.exp(-normed @ gate)) * (normed @ up)) @ down
    head = weights["embedding"]["embedding"].T if config.tie_embeddings else weights["head"]["kernel"]
    return norm(hidden, weights["norm"]) @ head, pairs


@functools.cache
def run_transformer(**options):
    """Parameters, gradients of a loss, logits and routing inputs of a model, in one compiled call."""
    graph, state = nnx.split(nn.Transformer(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0)))
    _, segment_ids, tokens = draw()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(state):
        model = nnx.merge(graph, state)
        logits = model(tokens, segment_ids)
        return jnp.square(logits).mean(), (logits, model.routing_inputs(tokens, segment_ids))

    gradients, (logits, pairs) = run(state)
    return nnx.to_pure_dict(state), nnx.to_pure_dict(gradients), logits, pairs


def assert_trees_close(actual, expected, dtype="float32"):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        cases.assert_close(one, other, dtype)


@pytest.mark.parametrize("is_packed", [False, True])
@every_kind
def test_attention_equals_its_formula(kind, is_packed):
    module = make(kind)
    inputs, segment_ids, _ = draw()
    segment_ids = segment_ids if is_packed else None
    output = nnx.jit(lambda module, *args: module(args[0], segment_ids=args[1]))(module, inputs, segment_ids)
    expected, query, key = attention_formula(weights_of(module), kind, inputs, segment_ids)
    cases.assert_close(output, expected, "float32")
    assert_trees_close(module.project(inputs, segment_ids)[:2], (query, key))


@every_kind
def test_padding_is_zero_and_never_leaks_S7(kind):
    inputs, _, _ = draw()
    inputs[1, 15:] = np.nan

    @nnx.jit
    @functools.partial(nnx.grad, has_aux=True)
    def gradient(module, inputs, seq_lengths):
        output = module(inputs, seq_lengths=seq_lengths)
        return jnp.square(output).sum(), output

    gradients, output = gradient(make(kind, use_bias=True), inputs, jnp.array([TOKENS, 15]))
    alone = nnx.jit(make(kind, use_bias=True))(inputs[1:, :15])
    cases.assert_close(output[1:, :15], alone, "float32")
    np.testing.assert_array_equal(output[1, 15:], 0)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(leaf[...]).all(), path
        assert path == ("key", "bias") or np.any(leaf[...] != 0), path  # all keys moved alike change nothing: rounding


@every_kind
def test_a_token_depends_on_nothing_later_and_on_no_other_segment(kind):
    inputs, _, _ = draw()
    segment_ids = np.array([[0] * 9 + [1] * 12] * BATCH, np.int32)
    module = make(kind)

    def tokens(inputs):
        return module(inputs, segment_ids=segment_ids)[0].sum(axis=-1)

    depends = np.any(jax.jit(jax.jacrev(tokens))(jnp.asarray(inputs)) != 0, axis=-1)  # [tokens, batch, tokens]
    assert not depends[:, 1].any()
    allowed = np.tril(segment_ids[:1] == segment_ids[0, :, None])
    assert not (depends[:, 0] & ~allowed).any()
    if kind == "dense":
        np.testing.assert_array_equal(depends[:, 0], allowed)
    if kind == "sliding_window":
        np.testing.assert_array_equal(depends[:, 0], np.triu(allowed, 1 - WINDOW))


@every_kind
def test_dtype_sets_the_computation_and_param_dtype_the_parameters(kind):
    module = make(kind, dtype=jnp.bfloat16, param_dtype=jnp.float16, use_bias=True)
    inputs, _, _ = draw()
    shapes = nnx.eval_shape(lambda module, inputs: (module(inputs), module.project(inputs)), module, inputs)
    assert {array.dtype for array in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype(jnp.float16)}


def test_moba_with_every_block_is_dense_attention_causal_or_not():
    inputs, _, _ = draw()
    for is_causal, lengths in ((True, [21, 20]), (False, [7, 0])):
        options = {"is_causal": is_causal, "key_conv_width": 3}
        modules = make("moba", top_k=6, **options), make("dense", **options)
        moba, dense = (nnx.jit(module)(inputs, seq_lengths=jnp.array(lengths)) for module in modules)
        cases.assert_close(moba, dense, "float32")


def test_key_conv_starts_small_and_equals_its_definition():
    _, segment_ids, _ = draw()
    module = nn.KeyConv(KV_HEADS, 64, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert np.std(module.kernel[...]) == pytest.approx(1 / 3, rel=0.15)
    key = np.random.default_rng(0).standard_normal((BATCH, TOKENS, KV_HEADS, 64)).astype(cases.as_dtype("bfloat16"))
    output = module(key.astype(np.float32), segment_ids)
    assert output.dtype == jnp.bfloat16
    cases.assert_close(output, convolve(key, module.kernel[...], segment_ids), "bfloat16")


def test_rotary_products_depend_on_the_distance_alone():
    query, key = (np.random.default_rng(i).standard_normal((1, 1, 1, 8)).astype(np.float32) for i in (0, 1))
    turned = [rotate(jnp.tile(array, (1, 20, 1, 1)), THETA)[0, :, 0] for array in (query, key)]
    products = np.asarray(turned[0] @ turned[1].T)
    cases.assert_close(products[3:, 3:], products[:-3, :-3], "float32")
    assert np.abs(products[1:, 0] - products[:-1, 0]).min() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_pattern": ("dense", "moba", "sliding_window"), "num_layers": 4, "tie_embeddings": True}],
    ids=["paper", "any_pattern"],
)
def test_transformer_equals_its_formula(options):
    weights, _, logits, pairs = run_transformer(**options)
    _, segment_ids, tokens = draw()
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    expected_logits, expected_pairs = transformer_formula(
        weights, dataclasses.replace(CONFIG, **options), tokens, segment_ids
    )
    assert logits.dtype == jnp.float32
    cases.assert_close(logits, expected_logits, "float32")
    assert_trees_close(pairs, expected_pairs)


@pytest.mark.parametrize(("remat", "scan_layers"), [(True, False), (False, True)])
def test_remat_and_scan_give_the_numbers_of_the_plain_loop(remat, scan_layers):
    _, loop_gradients, loop_logits, loop_pairs = run_transformer()
    _, gradients, logits, pairs = run_transformer(remat=remat, scan_layers=scan_layers)
    cases.assert_close(logits, loop_logits, "float32")
    assert_trees_close(pairs, loop_pairs)
    layers = loop_gradients["layers"]
    if scan_layers:  # layer i of the loop is repeat i // 2 at place i % 2
        layers = {i: jax.tree.map(lambda *leaves: np.stack(leaves), layers[i], layers[i + 2]) for i in (0, 1)}
    assert_trees_close(gradients, loop_gradients | {"layers": layers})


def test_every_parameter_of_the_transformer_has_a_gradient():
    _, gradients, _, _ = run_transformer()
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.any(leaf != 0), path


def test_a_bfloat16_transformer_gives_float32_logits_near_the_float32_ones():
    _, _, tokens = draw()
    config = dataclasses.replace(CONFIG, layer_pattern=("dense",), num_layers=1)
    models = [
        nn.Transformer(dataclasses.replace(config, dtype=name), rngs=nnx.Rngs(0)) for name in ("float32", "bfloat16")
    ]
    plain, logits = (nnx.jit(model)(tokens) for model in models)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, plain, atol=0.1)
    pairs = nnx.eval_shape(lambda model: model.routing_inputs(tokens), models[1])
    assert {array.dtype for array in jax.tree.leaves(pairs)} == {jnp.dtype(jnp.bfloat16)}
    assert {array.dtype for array in jax.tree.leaves(nnx.state(models[1]))} == {jnp.dtype(jnp.float32)}


def test_modules_work_inside_somebody_else_s_model():
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.mix = make("moba", rngs=rngs)
            self.head = nnx.Linear(FEATURES, 1, rngs=rngs)

        def __call__(self, inputs):
            return self.head(inputs + self.mix(inputs))

    inputs, _, _ = draw()
    model = Mine(nnx.Rngs(0))

    @nnx.jit
    @nnx.value_and_grad
    def loss(model):
        return jnp.square(model(inputs) - 1).mean()

    before, gradients = loss(model)
    nnx.update(model, jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, nnx.state(model), gradients))
    assert loss(model)[0] < before


def test_attention_fn_of_flax_is_moba_attention():
    options = {"num_kv_heads": KV_HEADS, "qkv_features": HEADS * HEAD_DIM, "decode": False, "rngs": nnx.Rngs(0)}
    attention_fn = nn.moba_attention_fn(block_size=BLOCK, top_k=TOP_K)
    module = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=attention_fn, **options)
    inputs, _, _ = draw()

    @functools.partial(nnx.jit, static_argnames="is_causal")
    def call(module, inputs, is_causal):
        query, key, value = module.query(inputs), module.key(inputs), module.value(inputs)
        options = {"block_size": BLOCK, "top_k": TOP_K, "is_causal": is_causal}
        expected = module.out(sparse_attn.moba_attention(query, key, value, **options))
        return module(inputs[None], is_causal=is_causal)[0], expected  # any batch axes

    for is_causal in (True, False):
        cases.assert_close(*call(module, inputs, is_causal), "float32")


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("mask", {}, {"mask": np.ones((BATCH, 1, TOKENS, TOKENS), bool)}),
        ("dropout_rate", {"dropout_rate": 0.1, "deterministic": False}, {}),
        ("precision", {"precision": "highest"}, {}),
        ("module", {}, {"sow_weights": True}),
    ],
)
def test_attention_fn_names_what_it_cannot_do(name, options, call):
    attention_fn = nn.moba_attention_fn(block_size=BLOCK, top_k=TOP_K)
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options
    )
    with pytest.raises(ValueError, match=name):
        module(draw()[0], is_causal=True, **call)
    query = np.ones((1, 4, 2, 3), np.float32)
    with pytest.raises(ValueError, match="bias"):
        attention_fn(query, query, query, bias=np.ones((1, 2, 4, 4)))


def test_modules_work_from_linen():
    class Mine(linen.Module):
        @linen.compact
        def __call__(self, inputs, segment_ids):
            options = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "block_size": BLOCK, "top_k": TOP_K}
            mix = nnx.bridge.to_linen(nn.MoBAAttention, FEATURES, HEADS, key_conv_width=3, name="mix", **options)
            return mix(linen.Dense(FEATURES, name="dense")(inputs), segment_ids=segment_ids)

    inputs, segment_ids, _ = draw()
    variables = Mine().init(jax.random.key(0), inputs, segment_ids)
    output = jax.jit(Mine().apply)(variables, inputs, segment_ids)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    hidden = inputs @ weights["dense"]["kernel"] + weights["dense"]["bias"]
    expected, _, _ = attention_formula(weights["mix"], "moba", hidden, segment_ids)
    cases.assert_close(output, expected, "float32")


def test_the_transformer_works_from_linen():
    _, segment_ids, tokens = draw()
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
        import dataclasses
        import jax, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, PartitionSpec as P
        from sparse_attn import nn
        from tests.test_nn import BLOCK, CONFIG, FEATURES, HEADS, TOP_K, draw

        assert len(jax.devices()) == 2
        mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
        names = {"vocab": None, "embed": None, "heads": "model", "head_dim": None, "mlp": "model"}
        inputs, segment_ids, tokens = draw()
        config = dataclasses.replace(CONFIG, layer_pattern=("moba",), num_layers=2, scan_layers=True)
        predict = nnx.jit(lambda model: model(tokens, segment_ids))
        with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(names.items())):
            model = nnx.jit(lambda: nn.Transformer(config, logical_axes=True, rngs=nnx.Rngs(0)))()
            specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
            logits = predict(model)
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
                FEATURES, HEADS, head_dim=6, block_size=BLOCK, top_k=TOP_K, kernel_init=kernel_init,
                out_kernel_init=nnx.initializers.lecun_normal(), rngs=nnx.Rngs(0),
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


def test_the_library_itself_does_not_need_flax():
    program = "import sys, sparse_attn; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("num_heads", {"head_dim": None, "in_features": 13}),
        ("key_conv_width", {"key_conv_width": -3}),
    ],
)
def test_bad_module_sizes_are_named_S10(name, options):
    sizes = {"in_features": FEATURES, "num_heads": HEADS, "head_dim": HEAD_DIM, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=name):
        nn.MoBAAttention(**({"block_size": BLOCK, "top_k": TOP_K} | sizes | options))
    with pytest.raises(ValueError, match="width"):
        nn.KeyConv(1, 2, 0, rngs=nnx.Rngs(0))


def test_bad_inputs_are_named_S10():
    module = make("sliding_window")
    inputs, segment_ids, _ = draw()
    for name, arguments in {
        "inputs": {"inputs": inputs[0]},
        "segment_ids": {"inputs": inputs, "segment_ids": segment_ids[:, 1:]},
        "seq_lengths": {"inputs": inputs, "seq_lengths": np.ones(BATCH)},
    }.items():
        with pytest.raises(ValueError, match=name):
            module(**arguments)
    with pytest.raises(ValueError, match="head_dim"):
        make("sliding_window", head_dim=3)(inputs)
    with pytest.raises(ValueError, match="tokens"):
        nn.Transformer(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))(inputs)
