"""Derivatives beyond the first gradient, what remat policies keep, and programs of symbolic size."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import moba_attention, sliding_window_attention
from sparse_attn.nn import moba_attention_fn
from sparse_attn.systems.xattention import XAttention
from tests import cases, oracle

CASE = cases.Case("derivatives", batch=2, queries=19, keys=19, heads=4, kv_heads=2, head_dim=4, block_size=4, top_k=2)
MIXED = cases.Case("derivatives_mixed", batch=2, queries=19, keys=19, heads=2, head_dim=4, block_size=4, top_k=2,
                   sequences="mixed")  # fmt: skip
moba = functools.partial(moba_attention, **CASE.options)


def draw(seed=0, case=CASE):
    arrays, sequences = cases.make_inputs(case, seed)
    query, key, value, _ = map(jnp.asarray, arrays.values())
    return (query, key, value), sequences


@pytest.mark.parametrize("case", [CASE, MIXED], ids=str)
def test_forward_mode_equals_differences_of_the_oracle(case):
    arrays, sequences = draw(case=case)
    tangents, _ = draw(1, case)
    attend = functools.partial(moba_attention, **case.options, **sequences)
    _, tangent = jax.jit(lambda arrays, tangents: jax.jvp(attend, arrays, tangents))(arrays, tangents)
    indices, _ = oracle.route(*map(np.asarray, arrays[:2]), **case.options, **sequences)
    mask = oracle.attention_mask(indices, num_keys=case.keys, block_size=case.block_size, **sequences)
    step = 1e-6
    moved = [[np.float64(x) + s * step * np.float64(t) for x, t in zip(arrays, tangents, strict=True)] for s in (1, -1)]
    ahead, behind = (oracle.attention(*x, mask) for x in moved)
    cases.assert_close(tangent, (ahead - behind) / (2 * step), "float32")


SYSTEMS = {
    "moba": moba,
    "xattention": XAttention(block_size=4, stride=2, threshold=0.7),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_products_with_the_hessian_are_the_same_in_every_order_of_modes(name):
    """Forward over reverse, reverse over forward and reverse over reverse, against the dense definition."""
    arrays, _ = draw()
    tangents, _ = draw(1)
    attend = SYSTEMS[name]

    def products(attend):
        def loss(arrays):
            return jnp.sin(3 * attend(*arrays)).sum()

        def along(arrays):
            return jax.jvp(loss, (arrays,), (tangents,))[1]

        def dot(arrays):
            gradient = jax.grad(loss)(arrays)
            return sum((g * t).sum() for g, t in zip(gradient, tangents, strict=True))

        forward_over_reverse = jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1]
        return forward_over_reverse, jax.grad(along)(arrays), jax.grad(dot)(arrays)

    actual = jax.jit(lambda: products(attend))()
    if name == "moba":
        expected = jax.jit(lambda: products(functools.partial(moba, implementation="reference")))()[0]
    else:
        levels = SYSTEMS[name].select(*arrays[:2]).levels
        mask = (levels == 1).repeat(4, 2).repeat(4, 3)[:, :, :19, :19] & np.tri(19, dtype=bool)

        def dense(query, key, value):
            key, value = key.repeat(2, axis=2), value.repeat(2, axis=2)
            return jax.nn.dot_product_attention(query, key, value, mask=mask)

        expected = jax.jit(lambda: products(dense))()[0]
    for product in actual:
        jax.tree.map(lambda a, e: cases.assert_close(a, e, "float32"), product, expected)


def test_derivatives_of_many_directions_at_once():
    """vmap over cotangents and over tangents, of which the arrays have no part."""
    (query, key, value), _ = draw(case=cases.Case("few", batch=1, queries=5, keys=5, heads=1, kv_heads=1, head_dim=2))
    attend = functools.partial(moba_attention, key=key, value=value, block_size=2, top_k=2, is_causal=True)
    backward, forward = (jax.jit(jacobian(attend))(query) for jacobian in (jax.jacrev, jax.jacfwd))
    cases.assert_close(forward, backward, "float32")
    dense = functools.partial(attend, implementation="reference")
    cases.assert_close(backward, jax.jit(jax.jacrev(dense))(query), "float32")


def primitives(jaxpr):
    """Names of the primitives of a program, those inside it included, as often as they run."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (None, 5),  # route, forward; route, forward and backward
        (jax.checkpoint_policies.save_any_names_but_these(), 3),  # route, forward; backward
        (jax.checkpoint_policies.save_only_these_names("attention_output", "attention_log_sum_exp"), 4),
        (jax.checkpoint_policies.save_only_these_names("block_selection"), 4),
    ],
)
def test_remat_policies_keep_the_choice_and_the_results_by_name(policy, calls):
    arrays, _ = draw()

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(arrays):
        return jnp.sin(moba(*(jnp.sin(array) for array in arrays))).sum()

    names = list(primitives(jax.make_jaxpr(jax.grad(layer))(arrays).jaxpr))
    assert names.count("attention_by_platform") == calls


def test_programs_of_symbolic_size_serve_all_sizes():
    sizes = jax.export.symbolic_shape("batch, tokens")
    shapes = [jax.ShapeDtypeStruct((*sizes, heads, 4), jnp.float32) for heads in (4, 2, 2)]
    window = functools.partial(sliding_window_attention, window_size=5)
    for attend in (moba, functools.partial(moba, implementation="reference"), window):
        exported = jax.export.export(jax.jit(attend))(*shapes)
        for tokens in (1, 7, 40):
            case = cases.Case(
                "size", queries=tokens, keys=tokens, heads=4, kv_heads=2, head_dim=4, block_size=4, exact=True
            )
            arrays = [np.asarray(array) for array in draw(case=case)[0]]
            expected = oracle.moba(*arrays, **case.options)
            if attend is window:
                distance = np.arange(tokens)[:, None] - np.arange(tokens)
                mask = np.broadcast_to((distance >= 0) & (distance < 5), (2, 4, tokens, tokens))
                expected = oracle.attention(*arrays, mask)
            cases.assert_close(exported.call(*arrays), expected, "float32")


def test_equal_attention_functions_are_equal_hash_alike_and_pickle():
    one, two = (moba_attention_fn(block_size=8, top_k=2) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != moba_attention_fn(block_size=8, top_k=3)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(two) == one


@pytest.mark.parametrize("name", ["moba", "xattention"])
def test_bfloat16_gradients_are_as_near_as_those_of_dense_attention_where_logits_are_large(name):
    """All blocks are kept. With delta from a rounded output, dQ and dK were 2.6 times as wrong as dense attention's."""
    random = np.random.default_rng(0)
    query, key, value, d_output = (
        jnp.asarray(size * random.standard_normal((1, 128, 2, 64)), jnp.bfloat16) for size in (4, 4, 1, 1)
    )
    mask = np.broadcast_to(np.tri(128, dtype=bool), (1, 2, 128, 128))
    exact = [np.asarray(array, np.float64) for array in (query, key, value)]
    _, expected = oracle.attention(*exact, mask, d_output=np.asarray(d_output, np.float64))

    def errors(attend):
        gradients = jax.jit(lambda *arrays: jax.vjp(attend, *arrays)[1](d_output))(query, key, value)
        return np.array([np.linalg.norm(np.float64(g) - e) for g, e in zip(gradients, expected, strict=True)])

    attend = {
        "moba": functools.partial(moba_attention, block_size=16, top_k=8, is_causal=True),
        "xattention": XAttention(block_size=16, threshold=1.0),
    }[name]
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    assert (errors(attend) < 1.25 * errors(dense)).all()
