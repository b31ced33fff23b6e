"""MoBA over a sequence split over eight devices: every method against loops in NumPy, and the bytes they move."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sparse_attn.parallel import (
    CONTIGUOUS,
    Layout,
    communication_bytes,
    moba_attention_sharded,
    shard_sequence,
    unshard_sequence,
)
from tests.parallel import CASES, HALOS

pytestmark = pytest.mark.timeout(400)


@functools.cache
def run():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.parallel"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def results():
    done = run()  # once, even where it fails
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients_are_those_of_one_device(case):
    found = results()[case.name]
    assert max(found[name] for name in ("output", "query", "key", "value")) < 1e-5
    if case.rows_per_round is not None:
        assert found["rounds"] >= 3


@pytest.mark.parametrize("case", [case for case in CASES if case.method is not None], ids=lambda case: case.name)
def test_the_compiled_program_moves_the_bytes_of_the_formula(case):
    for compiled, formula in results()[case.name]["bytes"]:
        assert compiled == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("name", [case.name for case, _ in HALOS])
def test_what_looks_back_a_few_tokens_finds_them_on_other_shards(name):
    found = results()[name]
    assert {"output", "query", "key"} <= found.keys()
    assert max(found.values()) < 1e-5


def test_a_row_with_more_documents_than_promised_is_nan_and_no_other():
    share_of_nan, difference = results()["too many documents"]
    assert share_of_nan == 1
    assert difference < 1e-5


def trace(axes, *, tokens=64, heads=4, kv_heads=2, packed=False, **options):
    """Traces a call on a mesh of the axes given, name -> size; tokens are those of the whole sequence."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    names = tuple(axes)
    axis_name = names[0] if len(names) == 1 else names
    spec = PartitionSpec(None, names)

    def call(query, key, value, ids):
        ids = ids if packed else None
        sizes = {"block_size": 4, "top_k": 2} | options
        return moba_attention_sharded(query, key, value, axis_name=axis_name, segment_ids=ids, **sizes)

    arrays = [jax.ShapeDtypeStruct((1, tokens, number, 4), jnp.float32) for number in (heads, kv_heads, kv_heads)]
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return jax.eval_shape(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec), *arrays, ids)


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({"sequence": 8}, {"method": "ulysses"}, "'sequence' of size 8 must divide the 4 query heads"),
        (
            {"sequence": 4},
            {"method": "ulysses", "heads": 12, "kv_heads": 3},
            "'sequence' of size 4 .* 3 key/value heads",
        ),
        ({"x": 2, "y": 8}, {"method": "ulysses+dispatch"}, "'y' of size 8 must divide the 4 query heads"),
        ({"sequence": 8}, {"method": "ulysses+dispatch"}, "two mesh axes .* got axis_name='sequence'"),
        ({"sequence": 8}, {"layout": Layout(16)}, "stripes of 16 tokens must divide the 8 .* 'sequence' of size 8"),
        ({"sequence": 2}, {"layout": Layout(8), "block_size": 16}, "stripe must be a multiple of block_size=16, got 8"),
        ({"sequence": 8}, {"method": "dispatch", "packed": True}, "needs max_segments"),
        ({"sequence": 8}, {"method": "dispatch", "copied_blocks": 1, "block_size": 16}, "16 must divide the 8 tokens"),
        ({"sequence": 8}, {"copied_blocks": -1}, "copied_blocks"),
        ({"sequence": 8}, {"method": "ring"}, "method must be one of"),
        ({"sequence": 8}, {"rows_per_round": 0}, "rows_per_round"),
        ({"sequence": 8}, {"max_segments": 0}, "max_segments"),
        ({"sequence": 8}, {"block_size": 0}, "block_size"),
        ({"sequence": 8}, {"top_k": 0}, "top_k"),
    ],
)
def test_what_does_not_fit_is_named(axes, options, message):
    with pytest.raises(ValueError, match=message):
        trace(axes, **options)


def test_the_call_stands_in_a_shard_map_over_the_whole_mesh():
    shard = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    mesh = AbstractMesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, "sequence")

    def call(query, axis_name):
        return moba_attention_sharded(query, query, query, axis_name=axis_name, block_size=2, top_k=2)

    def trace(axes, axis_name):
        function = functools.partial(call, axis_name=axis_name)
        split = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        return jax.eval_shape(split, shard)

    with pytest.raises(ValueError, match=r"every axis of the mesh, got it without \{'data': 2\}"):
        trace({"sequence"}, "sequence")
    with pytest.raises(ValueError, match=r"axis_name must be of a jax.shard_map .* got 'tokens'"):
        trace({"data", "sequence"}, "tokens")
    with pytest.raises(ValueError, match=r"axis_name must be of a jax.shard_map .* got 'sequence'"):
        jax.eval_shape(functools.partial(call, axis_name="sequence"), shard)


def test_what_fits_traces():
    assert trace({"sequence": 8}).shape == (1, 64, 4, 4)
    assert trace({"x": 2, "y": 4}, packed=True, max_segments=3).shape == (1, 64, 4, 4)


@pytest.mark.parametrize("layout", [CONTIGUOUS, Layout(1), Layout(2), Layout(3)])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_hold_the_tokens_that_the_layout_says(layout, num_shards):
    tokens = np.arange(24)
    stripe = layout.stripe or 24 // num_shards
    expected = [t for shard in range(num_shards) for t in tokens if t // stripe % num_shards == shard]
    sharded = shard_sequence(tokens[None], num_shards=num_shards, layout=layout)
    np.testing.assert_array_equal(sharded[0], expected)
    np.testing.assert_array_equal(unshard_sequence(sharded, num_shards=num_shards, layout=layout)[0], tokens)
    for shard, held in enumerate(np.split(np.array(expected), num_shards)):
        np.testing.assert_array_equal(layout.positions(shard, held.size, num_shards), held)
        np.testing.assert_array_equal(layout.shard_of(held, held.size, num_shards), shard)


def test_a_sequence_of_no_whole_shards_is_refused():
    with pytest.raises(ValueError, match="num_shards=5 must divide the sequence, got 24"):
        shard_sequence(np.zeros((1, 24)), num_shards=5, layout=CONTIGUOUS)
    with pytest.raises(ValueError, match="stripes of 5 tokens must divide the 6"):
        unshard_sequence(np.zeros((1, 24)), num_shards=4, layout=Layout(5))
    with pytest.raises(ValueError, match="stripe"):
        Layout(0)


def bytes_of(method, num_shards, tokens):
    """Forward and backward bytes of 16 heads of 64, bfloat16, blocks of 128, top_k 8."""
    shards = int(np.prod(num_shards))
    shard = jax.ShapeDtypeStruct((1, tokens // shards, 16, 64), jnp.bfloat16)
    return communication_bytes(
        shard, shard, shard, num_shards=num_shards, method=method, block_size=128, top_k=8, layout=Layout(128)
    )


def test_the_formulas_by_hand():
    mib = 2**20
    assert bytes_of("gather", 16, 2**20) == (3840 * mib, 3840 * mib)  # 15/16 of 2^20 tokens x 4096 bytes
    assert bytes_of("ulysses", 16, 2**20) == (480 * mib, 480 * mib)  # 15/16 of 2^16 tokens x 8192 bytes
    # Each of 2^16 x 16 rows asks 7 shards: 2 x 128 bytes, a log-sum-exp and 8 ids of 2 bytes; means: 15/16 of 32 MiB.
    forward, backward = bytes_of("dispatch", 16, 2**20)
    assert forward == pytest.approx(7 * 276 * mib + 30 * mib, rel=1e-3)
    assert backward == pytest.approx(7 * (3 * 128 + 8 + 16) * mib, rel=1e-3)
