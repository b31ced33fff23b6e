"""Loops take several steps, the last one uneven: every size that decides one made small, for groups of 1 to 8 heads.

The sizes in use are set for speed, and shapes small enough for an oracle fit their first step. Here small shapes take
many steps; shapes and sizes are drawn together in the last tests.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import attention, window
from sparse_attn.attend import per_query, per_tile, route
from sparse_attn.attend.backends import XLA, Xla
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attend.per_key import attend_tokens
from sparse_attn.grammar import choose, rest
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from tests import attend, cases, oracle
from tests.backends import SMALL_STEPS
from tests.every_system import TOKENS, every_system
from tests.test_tiles import dense, draw, token_mask

GROUPS = (1, 2, 3, 4, 7, 8)
TILE_SYSTEMS = (
    "adaspa", "block_attention", "block_bert", "block_rank", "bsfa", "combiner", "orion_msp", "pbs_attention", "pisa",
    "prism", "proxy_attention", "psa", "rectified", "sale", "sla", "xattention",
)  # fmt: skip
every_group = pytest.mark.parametrize("group", GROUPS)


def output_and_gradients(function):
    def call(query, key, value, d_output):
        output, pull_back = jax.vjp(function, query, key, value)
        return output, pull_back(d_output)

    return jax.jit(call)


def check_moba(case, backend, seed=0):
    """Choice, output and gradients of MoBA with the sizes of the backend."""

    @jax.jit
    def call(query, key, value, d_output, sequences):
        options = {**case.options, "implementation": backend, **sequences}
        output, pull_back = jax.vjp(functools.partial(sparse_attn.moba_attention, **options), query, key, value)
        return sparse_attn.route_moba(query, key, **options).indices, output, pull_back(d_output)

    arrays, sequences = cases.make_inputs(case, seed)
    query, key, value, d_output = arrays.values()
    indices, output, gradients = call(*arrays.values(), sequences)
    want, gap = oracle.route(query, key, **case.options, **sequences)
    assert gap.min() > 0, "rounding may change a choice: draw exact numbers"
    np.testing.assert_array_equal(indices, want)
    expected, expected_gradients = oracle.moba(query, key, value, d_output=d_output, **case.options, **sequences)
    cases.assert_close(output, expected, case.dtype)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, case.dtype)


@every_group
def test_moba_over_chunks_and_steps(group):
    sequences = "mixed" if group % 2 else "full"
    case = cases.Case(
        "loops", batch=2, queries=13, keys=21, heads=2 * group, head_dim=4, block_size=2, top_k=3, exact=True,
        sequences=sequences,
    )  # fmt: skip
    rows = SMALL_STEPS.per_query_sizes.rows_per_chunk
    assert case.queries * group > 2 * rows or group == 1  # three chunks or more
    assert (
        -(-case.keys // case.block_size) > 3 * SMALL_STEPS.route_sizes.blocks_per_step
    )  # four steps of the router, the last uneven
    check_moba(case, SMALL_STEPS)


@pytest.mark.parametrize(
    ("group", "step_bytes", "sequences", "plan"),
    [
        (1, 10**9, "full", {"num_chunks": 1, "num_steps": 1, "heads_per_step": 4}),
        (8, 6000, "full", {"num_chunks": 8, "num_steps": 3, "heads_per_step": 1}),
        (8, 200000, "full", {"num_chunks": 1, "num_steps": 1, "heads_per_step": 2}),
        (2, 10**9, "mixed", {"num_chunks": 1, "num_steps": None, "heads_per_step": 4}),
        (7, 3000, "mixed", {"num_chunks": 4, "num_steps": None, "heads_per_step": 1}),
    ],
)
def test_moba_in_few_steps_as_on_an_accelerator(group, step_bytes, sequences, plan):
    case = cases.Case(
        "few_steps", batch=2, queries=29, keys=21, heads=2 * group, head_dim=4, block_size=2, top_k=3, exact=True,
        sequences=sequences,
    )  # fmt: skip
    sizes = per_query.Sizes(tile_sizes=(4, 2), step_bytes=step_bytes)
    prepared, blocks = attend.prepare(case, *list(cases.make_inputs(case)[0].values())[:3], cases.make_inputs(case)[1])
    choice = PerQuery(jnp.zeros((2, 2 * group, 29, 3), jnp.int32), blocks)
    made = per_query._make_plan(prepared, choice, 0.5, sizes, is_backward=False)
    assert {name: getattr(made, name) for name in plan} == plan
    check_moba(case, Xla(route.Sizes(step_bytes=step_bytes), sizes))


def iterations(jaxpr):
    """Iterations of all loops of a program; a loop whose length is not known fails."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [sub for value in equation.params.values() for sub in jax.tree.leaves(value, is_leaf=is_jaxpr)]
        inner = [getattr(sub, "jaxpr", sub) for sub in inner if is_jaxpr(sub)]
        if equation.primitive.name == "while":
            raise AssertionError("a loop of unknown length")
        inside = sum(map(iterations, inner))
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += length * (1 + inside) if length > 1 else inside  # XLA makes no loop of one step
    return total


def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_on_an_accelerator_long_sequences_take_few_steps_of_known_length():
    """At 64K tokens, batch 2, 16 heads: at most 64 steps forward, the router's included, and 128 backward."""
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    query = jax.ShapeDtypeStruct((2, 65536, 16, 128), jnp.bfloat16)
    results = query, jax.ShapeDtypeStruct((2, 65536, 16), jnp.float32)
    blocks = jax.eval_shape(functools.partial(whole_rows, block_size=128, is_causal=True), query, query)
    choice = PerQuery(numbers((2, 16, 65536, 8)), blocks)
    (xla,) = (backend for backend in XLA.backends if backend.platforms is None)
    route = functools.partial(xla.route, top_k=8, is_causal=True)
    calls = (
        (route, (query, query, blocks)),
        (functools.partial(xla.forward, scale=0.1), ((query,) * 3, choice)),
        (functools.partial(xla.backward, scale=0.1), ((query,) * 3, choice, results, results)),
    )
    steps = [iterations(jax.make_jaxpr(function)(*arguments).jaxpr) for function, arguments in calls]
    assert min(steps) > 0
    assert sum(steps[:2]) <= 64
    assert sum(steps) <= 128


def test_many_heads_on_one_key_head_and_few_queries():
    """Chunks so short that what fills the last is longer than a query's heads."""
    case = cases.Case("many_heads", batch=1, queries=3, keys=9, heads=14, kv_heads=2, head_dim=4, block_size=2)
    check_moba(case, SMALL_STEPS)


@every_group
def test_tiles_over_steps(group):
    shape = (2, 21, 27, 2 * group, 2, 4, 3, 4, group != 2)
    query, key, value, levels, blocks = draw(shape)
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)
    num_tiles, step = 7 * group, 3 if group == 1 else 5
    assert num_tiles > 2 * step  # three steps or more
    assert num_tiles % step  # the last uneven
    backend = Xla(per_tile_sizes=per_tile.Sizes(logits_per_step=3 * 4 * step, elements_per_step=1))

    def attend(query, key, value):
        return attend_levels(query, key, value, levels, blocks, scale=0.5, implementation=backend).output()

    output, gradients = output_and_gradients(attend)(query, key, value, d_output)
    mask = token_mask(levels, blocks, 1, 21, 27, 2 * group)
    cases.assert_close(output, dense(query, key, value, mask, 0.5)[0], "float32")
    _, expected = oracle.attention(query, key, value, mask, scale=0.5, d_output=d_output)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        cases.assert_close(gradient, expected_gradient, "float32")


@every_group
@pytest.mark.parametrize("window_size", [3, 6])
def test_window_over_chunks_and_parts(group, window_size):
    random = np.random.default_rng(group)
    query, d_output = random.standard_normal((2, 2, 23, 2 * group, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 23, 2, 4)).astype(np.float32)
    ids = np.sort(random.integers(0, 3, (2, 23)))
    sizes = window.Sizes(min_chunk=4, max_queries=2)  # six chunks of 4 or five of 5, the last uneven, in parts of 2

    def attend(query, key, value):
        return window.attend_window(query, key, value, ids, window_size=window_size, scale=0.5, sizes=sizes)

    output, gradients = output_and_gradients(attend)(query, key, value, d_output)
    distance = np.arange(23)[:, None] - np.arange(23)
    mask = (distance >= 0) & (distance < window_size) & (ids[:, None, :, None] == ids[:, None, None])
    mask = np.broadcast_to(mask, (2, 2 * group, 23, 23))
    expected, expected_gradients = oracle.attention(query, key, value, mask, scale=0.5, d_output=d_output)
    cases.assert_close(output, expected, "float32")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, "float32")


@every_group
def test_lists_of_tokens_over_steps(group, monkeypatch):
    monkeypatch.setattr(
        "sparse_attn.attend.per_key._GATHERED_PER_STEP", 2 * 2 * 5 * 4 * 3
    )  # three queries a step: 3, 3, 3, 1
    random = np.random.default_rng(group)
    query, d_output = random.standard_normal((2, 2, 10, 2 * group, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 13, 2, 4)).astype(np.float32)
    indices = random.permuted(np.broadcast_to(np.arange(13), (2, 2, 10, 13)), axis=-1)[..., :5].astype(np.int32)
    mask = (indices[..., None] == np.arange(13)).any(-2).repeat(group, 1)

    def attend(query, key, value):
        return attend_tokens(query, key, value, indices, scale=0.5).output()

    output, gradients = output_and_gradients(attend)(query, key, value, d_output)
    expected, expected_gradients = oracle.attention(query, key, value, mask, scale=0.5, d_output=d_output)
    cases.assert_close(output, expected, "float32")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, "float32")


@every_group
def test_stand_ins_over_steps(group, monkeypatch):
    monkeypatch.setattr(rest, "_LOGITS_PER_STEP", 2 * 2 * 2 * group * 3 * 5)  # two query blocks a step: 2, 2, 1
    random = np.random.default_rng(group)
    query, d_output = random.standard_normal((2, 2, 14, 2 * group, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 5, 2, 4)).astype(np.float32)
    is_used = random.random((2, 2 * group, 5, 5)) < 0.7

    def attend(query, key, value):
        no_weight = jnp.zeros(5)
        return rest.pooled(query, key, value, no_weight, is_used, query_block_size=3, scale=0.5).output()

    output, gradients = output_and_gradients(attend)(query, key, value, d_output)
    mask = is_used.repeat(3, 2)[:, :, :14]
    expected, expected_gradients = oracle.attention(query, key, value, mask, scale=0.5, d_output=d_output)
    cases.assert_close(output, expected, "float32")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, "float32")


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_choices_of_a_few_queries_at_a_time(chunk, monkeypatch):
    monkeypatch.setattr(choose, "_ELEMENTS_PER_STEP", 5 * chunk)
    numbers = np.arange(2 * 10 * 3).reshape(2, 10, 3)
    result = choose.by_queries(
        lambda position, array: array * 100 + position[None, :, None], (jnp.asarray(numbers),), elements_per_query=5
    )
    np.testing.assert_array_equal(result, numbers * 100 + np.arange(10)[None, :, None])


@st.composite
def shapes_and_sizes(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from(GROUPS))
    case = cases.Case(
        "drawn",
        batch=draw(st.integers(1, 2)),
        queries=draw(st.integers(1, 24)),
        keys=draw(st.integers(1, 24)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=4,
        block_size=draw(st.sampled_from([1, 2, 4, 8])),
        top_k=draw(st.integers(1, 5)),
        is_causal=draw(st.booleans()),
        sequences=draw(st.sampled_from(["full", "mixed"])),
        exact=True,
    )
    attend = per_query.Sizes(
        tile_sizes=draw(st.sampled_from([(8, 4), (3,), (1,)])),
        pairs_per_step=draw(st.integers(1, 12)),
        logits_per_step=draw(st.integers(1, 100)),
        rows_per_chunk=draw(st.integers(1, 40)),
        elements_per_step=draw(st.integers(1, 4000)),
    )
    routing = route.Sizes(
        rows_per_chunk=draw(st.integers(1, 40)),
        blocks_per_step=draw(st.integers(1, 6)),
        elements_per_step=draw(st.integers(1, 4000)),
    )
    return case, Xla(routing, attend)


@settings(max_examples=5)
@given(drawn=shapes_and_sizes(), seed=st.integers(0, 2**32 - 1))
def test_moba_for_shapes_and_sizes_drawn_together(drawn, seed):
    case, backend = drawn
    case = case.__class__(**{**case.__dict__, "top_k": min(case.top_k, -(-case.keys // case.block_size))})
    check_moba(case, backend, seed)


@settings(max_examples=5)
@given(
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.tuples(st.integers(1, 2), st.sampled_from(GROUPS)),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 4000)),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiles_for_shapes_and_sizes_drawn_together(lengths, blocks, heads, sizes, seed):
    kv_heads, group = heads
    shape = (1, *lengths, kv_heads * group, kv_heads, 4, *blocks, True)
    query, key, value, levels, blocks = draw(shape, seed)
    backend = Xla(per_tile_sizes=per_tile.Sizes(*sizes))
    attend = functools.partial(attend_levels, levels=levels, blocks=blocks, scale=0.5, implementation=backend)
    output, gradients = output_and_gradients(lambda *arrays: attend(*arrays).output())(query, key, value, query)
    mask = token_mask(levels, blocks, 1, *lengths, kv_heads * group)
    expected, expected_gradients = oracle.attention(query, key, value, mask, scale=0.5, d_output=query)
    cases.assert_close(output, expected, "float32")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        cases.assert_close(gradient, expected_gradient, "float32")


@pytest.mark.parametrize(("name", "group"), list(zip(TILE_SYSTEMS, itertools.cycle(GROUPS), strict=False)))
def test_systems_over_steps_equal_themselves_in_one_step(name, group, monkeypatch):
    """One step is what the tests of each system compare with loops; the choice is the same, to the bit."""
    random = np.random.default_rng(group)
    query, key, value = (
        jnp.asarray(random.standard_normal((1, TOKENS, heads, 8)), jnp.float32) for heads in (2 * group, 2, 2)
    )
    function = every_system(query, key)[name]

    def run():
        if name in ("sla", "pisa", "psa", "xattention"):  # elsewhere gradients are those of the tiles, tested above
            return output_and_gradients(function)(query, key, value, query)
        return jax.jit(lambda *arrays: function(*arrays))(query, key, value)

    one_step = run()
    monkeypatch.setattr(attention, "resolve", lambda implementation: SMALL_STEPS)
    monkeypatch.setattr(rest, "_LOGITS_PER_STEP", 1)
    jax.tree.map(lambda a, e: cases.assert_close(a, e, "float32"), run(), one_step)
