"""The attention modules: against NumPy in float64, against each other, and inside other people's models."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sparse_attn
from sparse_attn import nn
from sparse_attn.keys import rotate
from sparse_attn.systems.moba import MoBA
from sparse_attn.systems.rectified import RectifiedSpaAttn
from sparse_attn.systems.xattention import XAttention
from tests import cases, oracle
from tests.test_keys import convolve
from tests.test_window import attend as attend_window

BATCH, TOKENS, FEATURES, HEADS, KV_HEADS, HEAD_DIM = 2, 21, 12, 4, 2, 6
WINDOW, BLOCK, TOP_K, THETA = 5, 4, 2, 100.0
KINDS = {
    "moba": functools.partial(nn.MoBAAttention, block_size=BLOCK, top_k=TOP_K, key_conv_width=3),
    "sliding_window": functools.partial(nn.SlidingWindowAttention, window_size=WINDOW, rope_theta=THETA),
    "dense": functools.partial(nn.DenseAttention, key_conv_width=5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    sizes = {"in_features": FEATURES, "num_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return KINDS[kind](**(sizes | {"rngs": nnx.Rngs(0)} | options))


def draw(seed=0):
    """Inputs of a module and segment ids."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((BATCH, TOKENS, FEATURES)).astype(np.float32)
    segment_ids = np.sort(random.integers(0, 3, (BATCH, TOKENS))).astype(np.int32)
    return inputs, segment_ids


def weights_of(module):
    """Nested dictionary of the parameters in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))


def attention_formula(weights, kind, inputs, segment_ids):
    """Output, query, key and value of a module; only the choice of blocks and masked attention come from the oracle."""
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
        indices = route(query, key, block_size=BLOCK, top_k=top_k, **sequences)
        mask = oracle.attention_mask(indices, num_keys=key.shape[1], block_size=BLOCK, **sequences)
        output = oracle.attention(query, key, value, mask)
    return np.einsum("bthd,hdf->btf", output, weights["out"]["kernel"]), query, key, value


def route(query, key, **options):
    """Block ids of projected queries and keys; fails where their rounding may change one."""
    error = cases.TOLERANCE["float32"] * max(1, np.abs(query).max(), np.abs(key).max())  # to which they are tested
    indices, gap = oracle.route(np.asarray(query), np.asarray(key), **options, input_error=error)
    assert gap.min() > 0, "rounding may change a choice: take another seed"
    return indices


def turn(array):
    """Rotary positions as products of complex numbers."""
    half = array.shape[-1] // 2
    angles = np.arange(array.shape[1])[:, None] * THETA ** (-np.arange(half) / half)
    turned = (array[..., :half] + 1j * array[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def assert_trees_close(actual, expected, dtype="float32"):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        cases.assert_close(one, other, dtype)


@pytest.mark.parametrize("is_packed", [False, True])
@every_kind
def test_attention_equals_its_formula(kind, is_packed):
    module = make(kind)
    inputs, segment_ids = draw()
    segment_ids = segment_ids if is_packed else None
    output = nnx.jit(lambda module, *args: module(args[0], segment_ids=args[1]))(module, inputs, segment_ids)
    expected, query, key, _ = attention_formula(weights_of(module), kind, inputs, segment_ids)
    cases.assert_close(output, expected, "float32")
    assert_trees_close(module.project(inputs, segment_ids)[:2], (query, key))


# Tokens of each row in one call after another, among 8 or 1 that are given.
SPLITS = ((8, (8, 3)), (8, (5, 8)), (1, (1, 0)), (8, (7, 8)), (1, (0, 1)), (1, (0, 1)))


@every_kind
def test_a_module_with_a_cache_equals_its_formula_over_whole_rows(kind):
    module, (inputs, _) = make(kind), draw()
    expected, *_ = attention_formula(weights_of(module), kind, inputs, None)
    call = nnx.jit(lambda module, inputs, cache, num_new: module(inputs, cache=cache, num_new=num_new))
    cache, output, length = module.init_cache(BATCH, TOKENS), np.zeros_like(inputs), np.zeros(BATCH, int)
    for size, num_new in SPLITS:
        piece = np.full((BATCH, size, FEATURES), np.nan, np.float32)
        for row, count in enumerate(num_new):
            piece[row, :count] = inputs[row, length[row] : length[row] + count]
        out, cache = call(module, piece, cache, np.array(num_new))
        for row, count in enumerate(num_new):
            output[row, length[row] : length[row] + count] = out[row, :count]
            np.testing.assert_array_equal(out[row, count:], 0)
        length += num_new
    np.testing.assert_array_equal(cache.length, TOKENS)
    cases.assert_close(output, expected, "float32")


def test_a_module_that_keeps_its_cache_continues_where_it_stopped():
    inputs, _ = draw()
    module = make("moba")
    expected, *_ = attention_formula(weights_of(module), "moba", inputs, None)
    cached = nn.Cached(module, BATCH, TOKENS)
    call = nnx.jit(nn.Cached.__call__, donate_argnums=0)
    output = np.concatenate([call(cached, inputs[:, start : start + 7]) for start in range(0, TOKENS, 7)], axis=1)
    cases.assert_close(output, expected, "float32")
    assert set(nnx.state(cached, nnx.Cache)) == {"cache"}


def test_caches_have_the_dtype_of_the_computation():
    for options, dtype in (({"dtype": jnp.bfloat16}, "bfloat16"), ({"param_dtype": jnp.float16}, "float16")):
        module = make("dense", **options)
        assert module.init_cache(BATCH, 4).key.dtype == jnp.dtype(dtype)
    assert module.init_cache(BATCH, 4, dtype="float32", max_draft=2).max_draft == 2


def test_what_a_cache_cannot_do_is_named_S10():
    inputs, segment_ids = draw()
    module = make("moba")
    cache = module.init_cache(BATCH, TOKENS - 1)
    for name, arguments in {
        "segment_ids": {"cache": cache, "segment_ids": segment_ids},
        "seq_lengths": {"cache": cache, "seq_lengths": np.ones(BATCH, int)},
        "num_new": {"num_new": np.ones(BATCH, int)},
        f"max_length={TOKENS - 1}": {"cache": cache},
    }.items():
        with pytest.raises(ValueError, match=name):
            module(inputs, **arguments)
    with pytest.raises(ValueError, match="is_causal"):
        make("moba", is_causal=False).init_cache(BATCH, TOKENS)
    attention = XAttention(block_size=4, stride=2, threshold=0.6)
    other = nn.SelfAttention(attention=attention, in_features=FEATURES, num_heads=HEADS, rngs=nnx.Rngs(0))
    for call in (lambda: other.init_cache(BATCH, TOKENS), lambda: other(inputs, cache=cache)):
        with pytest.raises(NotImplementedError, match="XAttention cannot attend with a cache; MoBA"):
            call()


@every_kind
def test_padding_is_zero_and_never_leaks_S7(kind):
    inputs, _ = draw()
    inputs[1, 15:] = np.nan

    @nnx.jit
    @functools.partial(nnx.grad, has_aux=True)
    def gradient(module, inputs, seq_lengths):
        output = module(inputs, seq_lengths=seq_lengths)
        return jnp.square(output).sum(), output

    gradients, output = gradient(make(kind, use_bias=True), inputs, jnp.array([TOKENS, 15]))
    alone = nnx.jit(make(kind, use_bias=True))(inputs[1:, :15])
    if kind == "moba":
        route(*make(kind, use_bias=True).project(inputs[1:, :15])[:2], block_size=BLOCK, top_k=TOP_K)
    cases.assert_close(output[1:, :15], alone, "float32")
    np.testing.assert_array_equal(output[1, 15:], 0)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(leaf[...]).all(), path
        assert path == ("key", "bias") or np.any(leaf[...] != 0), path  # all keys moved alike change nothing: rounding


@every_kind
def test_a_token_depends_on_nothing_later_and_on_no_other_segment(kind):
    inputs, _ = draw()
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
    inputs, _ = draw()
    shapes = nnx.eval_shape(lambda module, inputs: (module(inputs), module.project(inputs)), module, inputs)
    assert {array.dtype for array in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype(jnp.float16)}


def test_moba_with_every_block_is_dense_attention_causal_or_not():
    inputs, _ = draw()
    for is_causal, lengths in ((True, [21, 20]), (False, [7, 0])):
        options = {"is_causal": is_causal, "key_conv_width": 3}
        modules = make("moba", top_k=6, **options), make("dense", **options)
        moba, dense = (nnx.jit(module)(inputs, seq_lengths=jnp.array(lengths)) for module in modules)
        cases.assert_close(moba, dense, "float32")


def test_key_conv_starts_small_and_equals_its_definition():
    _, segment_ids = draw()
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


def test_modules_work_inside_somebody_else_s_model():
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.mix = make("moba", rngs=rngs)
            self.head = nnx.Linear(FEATURES, 1, rngs=rngs)

        def __call__(self, inputs):
            return self.head(inputs + self.mix(inputs))

    inputs, _ = draw()
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
    inputs, _ = draw()

    @functools.partial(nnx.jit, static_argnames="is_causal")
    def call(module, inputs, is_causal):
        query, key, value = module.query(inputs), module.key(inputs), module.value(inputs)
        options = {"block_size": BLOCK, "top_k": TOP_K, "is_causal": is_causal}
        expected = module.out(sparse_attn.moba_attention(query, key, value, **options))
        return module(inputs[None], is_causal=is_causal)[0], expected  # any batch axes

    for is_causal in (True, False):
        route(module.query(inputs), module.key(inputs), block_size=BLOCK, top_k=TOP_K, is_causal=is_causal)
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


@pytest.mark.parametrize(
    "attention",
    [XAttention(block_size=4, stride=2, threshold=0.6), RectifiedSpaAttn(block_size=4), MoBA(block_size=4, top_k=2)],
    ids=lambda attention: type(attention).__name__,
)
def test_any_attention_that_is_a_value_becomes_a_layer(attention):
    sizes = {"in_features": FEATURES, "num_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    module = nn.SelfAttention(attention=attention, **sizes, rngs=nnx.Rngs(0))
    inputs, _ = draw()
    lengths = np.array([TOKENS, TOKENS - 5] + [TOKENS] * (BATCH - 2))  # from outside of jit: known when traced

    @nnx.jit
    def call(module, inputs):
        return module(inputs), module(inputs, seq_lengths=lengths)

    output, padded = call(module, inputs)
    query, key, value = module.project(inputs)
    cases.assert_close(output, module.out(attention(query, key, value)), "float32")
    alone = module(inputs[1:2, : TOKENS - 5])
    cases.assert_close(padded[1:2, : TOKENS - 5], alone, "float32")
    np.testing.assert_array_equal(padded[1, TOKENS - 5 :], 0)


def test_modules_work_from_linen():
    class Mine(linen.Module):
        @linen.compact
        def __call__(self, inputs, segment_ids):
            options = {"in_features": FEATURES, "num_heads": HEADS, "num_key_value_heads": KV_HEADS}
            options |= {"head_dim": HEAD_DIM, "key_conv_width": 3, "block_size": BLOCK, "top_k": TOP_K}
            mix = nnx.bridge.to_linen(nn.MoBAAttention, **options, name="mix")
            return mix(linen.Dense(FEATURES, name="dense")(inputs), segment_ids=segment_ids)

    inputs, segment_ids = draw()
    variables = Mine().init(jax.random.key(0), inputs, segment_ids)
    output = jax.jit(Mine().apply)(variables, inputs, segment_ids)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    hidden = inputs @ weights["dense"]["kernel"] + weights["dense"]["bias"]
    expected, *_ = attention_formula(weights["mix"], "moba", hidden, segment_ids)
    cases.assert_close(output, expected, "float32")


def test_the_library_itself_does_not_need_flax():
    program = "import sys, sparse_attn; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


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
    inputs, segment_ids = draw()
    for name, arguments in {
        "inputs": {"inputs": inputs[0]},
        "segment_ids": {"inputs": inputs, "segment_ids": segment_ids[:, 1:]},
        "seq_lengths": {"inputs": inputs, "seq_lengths": np.ones(BATCH)},
    }.items():
        with pytest.raises(ValueError, match=name):
            module(**arguments)
    with pytest.raises(ValueError, match="head_dim"):
        make("sliding_window", head_dim=3)(inputs)
