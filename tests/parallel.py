"""Runs context parallelism on eight CPU devices and prints what came of it; a process of its own, as `tests.sharded`.

python -m tests.parallel prints a JSON object: name -> {"output", "query", "key", "value": largest difference from the
oracle, "rounds", "bytes": pairs of what a device receives in the compiled program and of the formula, for forward and
backward together and, of some, for forward alone}. Numbers are multiples of 1/8, so that scores are exact and ties
frequent: a choice that differed would show.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_attn import causal_key_convolution, sliding_window_attention
from sparse_attn.attend import per_query, route
from sparse_attn.attend.backends import Xla
from sparse_attn.parallel import (
    CONTIGUOUS,
    Layout,
    causal_key_convolution_sharded,
    communication_bytes,
    moba_attention_sharded,
    shard_sequence,
    sliding_window_attention_sharded,
    unshard_sequence,
)
from tests import near_ties, oracle

TOKENS, HEAD_DIM = 64, 4
SMALL_STEPS = Xla(  # as in `tests.backends`, which starts JAX
    route.Sizes(rows_per_chunk=5, blocks_per_step=3, elements_per_step=1),
    per_query.Sizes(tile_sizes=(4, 2), pairs_per_step=8, logits_per_step=64, rows_per_chunk=8, elements_per_step=1),
)
ITEM_BYTES = {"f32": 4, "s32": 4, "s16": 2, "pred": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call on a mesh of data x sequence, or data x outer x inner.

    Attributes:
      ids: None, "sorted" (documents that end inside shards) or "mixed" (whose tokens lie in no order).
      one_block: whether every query matches the first block best.
      has_forward_bytes: whether to compile the forward pass alone too.
    """

    name: str
    mesh: tuple[int, ...]
    method: str | None
    layout: Layout = CONTIGUOUS
    heads: int = 4
    kv_heads: int = 2
    block_size: int = 4
    top_k: int = 3
    ids: str | None = None
    rows_per_round: int | None = None
    copied_blocks: int = 0
    one_block: bool = False
    implementation: object = "reference"
    has_forward_bytes: bool = False

    @property
    def num_shards(self):
        return self.mesh[1:] if len(self.mesh) == 3 else self.mesh[1]

    @property
    def sizes(self):
        """What the call and the formula take alike."""
        packed = {} if self.ids is None else {"max_segments": 4}
        return {
            "method": self.method, "layout": self.layout, "block_size": self.block_size, "top_k": self.top_k,
            "rows_per_round": self.rows_per_round, "copied_blocks": self.copied_blocks, **packed,
        }  # fmt: skip


CASES = (
    Case("gather, grouped heads, documents", (2, 4), "gather", heads=6, ids="sorted"),
    Case("gather, stripes", (1, 4, 2), "gather", Layout(4), has_forward_bytes=True),
    Case("ulysses, contiguous", (4, 2), "ulysses"),
    Case("ulysses, few key heads, documents, stripes", (2, 4), "ulysses", Layout(8), ids="sorted",
         has_forward_bytes=True),
    Case("dispatch, contiguous", (4, 2), "dispatch", top_k=4, rows_per_round=9),
    Case("dispatch, stripes", (2, 4), "dispatch", Layout(8), rows_per_round=5, has_forward_bytes=True),
    Case("dispatch, more devices than blocks", (1, 8), "dispatch", block_size=16, rows_per_round=3),
    Case("dispatch, all to one block", (1, 8), "dispatch", heads=6, one_block=True, rows_per_round=6),
    Case("dispatch, the first block copied", (1, 8), "dispatch", heads=6, one_block=True, rows_per_round=6,
         copied_blocks=1),
    Case("dispatch, blocks copied, stripes", (2, 2, 2), "ulysses+dispatch", Layout(8), rows_per_round=3,
         copied_blocks=3),
    Case("dispatch, documents", (2, 4), "dispatch", ids="sorted", rows_per_round=8),
    Case("dispatch, documents in no order, stripes", (2, 4), "dispatch", Layout(4), ids="mixed", rows_per_round=7,
         implementation=SMALL_STEPS),
    Case("both, stripes", (1, 2, 4), "ulysses+dispatch", Layout(4), rows_per_round=8, has_forward_bytes=True),
    Case("both, documents", (1, 4, 2), "ulysses+dispatch", ids="sorted", rows_per_round=8),
    Case("the method is chosen", (1, 4, 2), None),
)  # fmt: skip

# Contiguous and striped; windows and convolutions that end in the stripe before, and further back.
HALOS = (
    (Case("convolution", (2, 4), None, ids="sorted"), None),
    (Case("convolution, short stripes", (2, 4), None, Layout(2)), None),
    (Case("window", (2, 4), None, ids="sorted"), 7),
    (Case("window over several shards", (1, 8), None), 21),
    (Case("window over more stripes than shards", (1, 2, 2), None, Layout(4), ids="mixed"), 30),
)


def draw(case):
    """Query, key, value, cotangent of the output, and ids or None."""
    random = np.random.default_rng(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = ((case.mesh[0], TOKENS, number, HEAD_DIM) for number in heads)
    query, key, value, d_output = (near_ties.eighths(random.standard_normal(x)).astype(np.float32) for x in shapes)
    if case.one_block:
        query, key[:, : case.block_size] = np.abs(query) + 0.125, 4
    ids = random.integers(0, 4, (case.mesh[0], TOKENS)).astype(np.int32)
    return (query, key, value, d_output), {None: None, "mixed": ids, "sorted": np.sort(ids, -1)}[case.ids]


def make_mesh(shape):
    names = ("data", "outer", "inner") if len(shape) == 3 else ("data", "sequence")
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    axis = names[1:] if len(shape) == 3 else names[1]
    return mesh, axis, PartitionSpec("data", axis)


def run_on_shards(function, arrays, case):
    """Results of function(*arrays), whose sequences lie split over the case's mesh, and the text of its program.

    function is of shards and takes axis_name; arrays are `[batch, sequence, ...]`, those of three axes `[x, x, x]` and
    whole on every device. Results are of the kinds of arrays.
    """
    mesh, axis, spec = make_mesh(case.mesh)
    order = {"num_shards": int(np.prod(case.mesh[1:])), "layout": case.layout}

    def spec_of(array):
        return PartitionSpec() if array.ndim == 3 else spec

    def split(*arrays):
        call = functools.partial(function, axis_name=axis)
        return jax.shard_map(call, mesh=mesh, in_specs=tuple(map(spec_of, arrays)), out_specs=spec)(*arrays)

    def forward_and_backward(d_output, *arrays):
        floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        output, pull_back = jax.vjp(lambda *x: split(*x, *arrays[len(x) :]), *floats)
        return output, *pull_back(d_output)

    def place(array):
        array = jnp.asarray(array) if array.ndim == 3 else shard_sequence(array, **order)
        return jax.device_put(array, NamedSharding(mesh, spec_of(array)))

    arrays = list(map(place, arrays))
    program = jax.jit(forward_and_backward).lower(*arrays).compile()
    results = [np.asarray(x if x.ndim == 3 else unshard_sequence(x, **order)) for x in program(*arrays)]
    forward = jax.jit(split).lower(*arrays[1:]).compile() if case.has_forward_bytes else None
    return results, program.as_text(), forward and forward.as_text()


def group_size(line):
    """How many devices a collective joins, in each of the ways in which XLA writes it."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return len(listed[1].split(","))
    if (counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(counted[1])
    mesh, axes = re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes)]))


def received(text, rounds):
    """Bytes that a device receives from others in a compiled program whose loops around collectives take `rounds`."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    (entry,) = re.findall(r"^ENTRY %(\S+) ", text, re.MULTILINE)

    def count(name):
        total = 0
        for line in bodies[name].splitlines():
            called = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)", line)
            total += sum(map(count, called)) * (rounds if "body=" in line else 1)
            if (found := COLLECTIVE.search(line)) is not None:
                result, kind = found.groups()
                size = sum(
                    ITEM_BYTES[dtype] * np.prod([int(n) for n in shape.split(",") if n], dtype=int)
                    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
                )
                devices = 1 if kind == "collective-permute" else group_size(line)
                share = {
                    "all-reduce": 2 * (devices - 1) / devices,
                    "reduce-scatter": devices - 1,
                    "collective-permute": 1,
                }.get(kind, (devices - 1) / devices)
                total += share * size
        return total

    return count(entry)


def rounds_of(case, indices, sequences):
    """Rounds that dispatch needs, counted row by row; indices are the oracle's."""
    outer, inner = case.num_shards if len(case.mesh) == 3 else (case.num_shards, 1)
    stripe = (case.layout.stripe or TOKENS // outer // inner) * inner
    shard = np.arange(TOKENS) // stripe % outer
    group = case.heads // max(case.kv_heads, inner)
    count = np.zeros((case.mesh[0], TOKENS))  # how often a block is chosen from elsewhere
    for b, h, t in np.ndindex(indices.shape[:3]):
        for block in indices[b, h, t]:
            count[b, block] += block >= 0 and shard[block * case.block_size % TOKENS] != shard[t]
    copied = np.argsort(-count, axis=1, kind="stable")[:, : case.copied_blocks]
    rows = np.zeros((case.mesh[0], case.heads // group, outer, outer), int)
    views = oracle.views(TOKENS, TOKENS, batch_size=case.mesh[0], block_size=case.block_size, **sequences)
    for b, h, t in np.ndindex(indices.shape[:3]):
        view = views[b][t]
        blocks = set(indices[b, h, t]) - {-1, *copied[b]}
        seen = [token for block in blocks for token in view.blocks[block] if token in view.visible]
        for other in set(shard[seen]) - {shard[t]}:
            rows[b, h // group, shard[t], other] += 1
    return -(-int(rows.max()) // case.rows_per_round)


def differences(results, expected):
    names = ("output", "query", "key", "value")
    return {name: float(np.abs(x - y).max()) for name, x, y in zip(names, results, expected, strict=False)}


def run(case):
    (query, key, value, d_output), ids = draw(case)
    ids = () if ids is None else (ids,)

    def attend(query, key, value, *ids, axis_name):
        return moba_attention_sharded(
            query, key, value, axis_name=axis_name, segment_ids=ids[0] if ids else None,
            implementation=case.implementation, **case.sizes,
        )  # fmt: skip

    results, text, forward_text = run_on_shards(attend, (d_output, query, key, value, *ids), case)
    options = {"block_size": case.block_size, "top_k": case.top_k}
    sequences = {"query_segment_ids": ids[0], "key_value_segment_ids": ids[0]} if ids else {}
    indices, gap = oracle.route(query, key, **options, **sequences)
    assert gap.min() > 0
    output, gradients = oracle.moba(query, key, value, d_output=d_output, **options, **sequences)
    found = differences(results, (output, *gradients))
    if case.method is not None:
        found["rounds"] = rounds = rounds_of(case, indices, sequences) if case.rows_per_round else 1
        local_tokens = TOKENS // int(np.prod(case.mesh[1:]))
        *local, ids = (
            x if x is None else jax.ShapeDtypeStruct((1, local_tokens, *x.shape[2:]), x.dtype)
            for x in (query, key, value, ids[0] if ids else None)
        )
        formula = communication_bytes(*local, num_shards=case.num_shards, segment_ids=ids, rounds=rounds, **case.sizes)
        found["bytes"] = [[received(text, rounds), sum(formula)]]
        if forward_text is not None:
            found["bytes"].append([received(forward_text, rounds), formula.forward])
    return found


def run_halo(case, window_size):
    """Key convolution, or a sliding window of that size, of a case's keys and documents."""
    (query, key, value, d_output), ids = draw(case)
    ids = () if ids is None else (ids,)
    if window_size is None:
        kernel = np.random.default_rng(1).standard_normal((4, *key.shape[2:])).astype(np.float32)
        sharded = functools.partial(causal_key_convolution_sharded, layout=case.layout)
        whole, operands = causal_key_convolution, (key, kernel)
        d_output = value
    else:

        def sharded(query, key, value, *ids, axis_name):
            return sliding_window_attention_sharded(
                query, key, value, axis_name=axis_name, window_size=window_size, layout=case.layout,
                segment_ids=ids[0] if ids else None,
            )  # fmt: skip

        def whole(query, key, value, *ids):
            return sliding_window_attention(
                query, key, value, window_size=window_size, segment_ids=ids[0] if ids else None
            )

        operands = query, key, value
    results, _, _ = run_on_shards(sharded, (d_output, *operands, *ids), case)
    output, pull_back = jax.vjp(lambda *x: whole(*x, *ids), *operands)
    return differences(results, (output, *pull_back(d_output)))


def too_many_documents():
    """Of two rows, one with more documents than max_segments: its share of NaN, and the other's difference."""
    case = Case("", (1, 8), "dispatch")
    query, key, value = (np.tile(array, (2, 1, 1, 1)) for array in draw(case)[0][:3])
    ids = np.stack([np.zeros(TOKENS), np.arange(TOKENS) // 3]).astype(np.int32)

    def attend(query, key, value, ids, axis_name):
        options = {**case.sizes, "max_segments": 1, "implementation": "reference"}
        return moba_attention_sharded(query, key, value, axis_name=axis_name, segment_ids=ids, **options)

    (output, *_), _, _ = run_on_shards(attend, (query, query, key, value, ids), case)
    expected = oracle.moba(query[:1], key[:1], value[:1], block_size=case.block_size, top_k=case.top_k)
    return [float(np.isnan(output[1]).mean()), float(np.abs(output[0] - expected[0]).max())]


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    result = {case.name: run(case) for case in CASES}
    result |= {case.name: run_halo(case, window_size) for case, window_size in HALOS}
    result["too many documents"] = too_many_documents()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
