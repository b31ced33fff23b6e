"""Is it right on this machine, and what is fastest? `python -m experiments verify [--out FILE.json]`.

Needs JAX and the repository, nothing else. In about two minutes, wherever JAX runs:

1. Every implementation against float64 NumPy: the router's choice where rounding cannot decide it, outputs and
   gradients over a given choice, at small sizes and at 2K to 8K tokens, with grouped heads and packed rows; every call
   twice, for the same bits. float32 is checked with jax_default_matmul_precision="highest".
2. Time and memory of each implementation and of the platform's dense attention, at 2K to 64K tokens.

Every call runs in another process: one that hangs or crashes is reported, and the rest is done. The table says what is
right, what is refused and why, what is fastest, and the `implementation=` to write; the JSON file says more. Send it to
us: what stands under experiments/results/ decides what `implementation=None` takes (sparse_attn/attend/backends.py).
The exit status is 1 if anything is wrong.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparse_attn
from experiments.kernels import oracle
from experiments.kernels.calls import dense_attention
from experiments.kernels.steps import Step, run_steps
from experiments.kernels.verdict import NAMES, PARTS, PASSES, fastest, table, wrong

# As a share of the largest expected value, at least of 1: 16-bit inputs are the oracle's own numbers and sums are
# float32, so what remains is the rounding of tiles and of the result; float32 sums hundreds of terms.
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
_LONGEST_CHECK = 60  # seconds
_LENGTHS = 2048, 4096, 8192, 16384, 32768, 65536
_LONGEST_REFERENCE = 2048  # tokens; `reference` holds tables of queries x keys


@dataclasses.dataclass(frozen=True)
class Case:
    """A causal call that is checked. All rows of a small one are compared, some of a real one."""

    name: str
    lengths: tuple[int, ...]  # of the segments of the one row
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    top_k: int
    dtype: str
    is_small: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


CASES = (
    Case("small, float32", (300,), 4, 2, 64, 32, 3, "float32", is_small=True),
    Case("small, packed, bfloat16", (70, 33, 197), 4, 1, 64, 32, 3, "bfloat16", is_small=True),
    Case("small, packed, float16", (100, 200), 2, 2, 64, 32, 3, "float16", is_small=True),
    Case("2K, float32", (2048,), 2, 2, 64, 64, 8, "float32"),
    Case("4K, packed, bfloat16", (1000, 96, 3000), 4, 2, 64, 64, 8, "bfloat16"),
    Case("8K, bfloat16", (8192,), 8, 2, 128, 128, 8, "bfloat16"),
)


def main(options: list[str]) -> int:
    """The command; `options` are those of the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("verify.json"), help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=2.0, help="when to stop measuring (minutes)")
    arguments = parser.parse_args(options)
    report = verify(time.monotonic() + 60 * arguments.minutes, arguments.out)
    print(table(report))
    return 1 if report["wrong"] else 0


def verify(deadline: float, out: pathlib.Path, is_rehearsal: bool = False) -> dict[str, Any]:
    """Does all of it; writes the report after every step.

    Args:
      deadline: of `time.monotonic`.
      out: the JSON file.
      is_rehearsal: whether to interpret the Triton kernels, and to do the smallest sizes alone.
    """
    report: dict[str, Any] = {"about": {}, "checks": [], "times": [], "wrong": [], "implementation": None}
    for step, outcome in run_steps(run_step, list(_steps(is_rehearsal)), _LONGEST_CHECK, deadline):
        if step["kind"] == "about":
            report["about"] = outcome
        else:
            report["checks" if step["kind"] == "check" else "times"].append(step | outcome)
        report["wrong"] = wrong(report)
        report["implementation"] = fastest(report)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _steps(is_rehearsal: bool) -> Iterator[Step]:
    """First what is right, the smallest sizes first, then the times, the shortest first, dense attention last."""
    yield {"kind": "about"}
    interpret = {"interpret": True} if is_rehearsal else {}
    names = ("pallas",) if is_rehearsal else NAMES
    for case in CASES[:1] if is_rehearsal else CASES:
        for name in names:
            for part in PARTS:
                check = {"kind": "check", "implementation": name, "case": case.name, "part": part}
                yield check | interpret
    for some in (names, ("dense",)):
        for tokens in (64,) if is_rehearsal else _LENGTHS:
            for name in some:
                for which in PASSES if name != "reference" or tokens <= _LONGEST_REFERENCE else ():
                    yield {"kind": "time", "implementation": name, "tokens": tokens, "pass": which} | interpret


def run_step(step: Step) -> dict[str, Any]:
    """One step, in a process of its own."""
    if step["kind"] == "about":
        return describe_machine()
    if step["kind"] == "check":
        (case,) = (case for case in CASES if case.name == step["case"])
        if step["implementation"] == "reference" and case.tokens > _LONGEST_REFERENCE:
            return {"left_out": "its memory grows with the square of the sequence"}
        return check(case, step["part"], _implementation(step))
    return measure(_implementation(step), step["tokens"], step["pass"])


def _implementation(step: Step) -> Any:
    if step.get("interpret") and step["implementation"] == "pallas":
        from sparse_attn.attend.backends import TritonKernels

        return TritonKernels(interpret=True)
    return step["implementation"]


def describe_machine() -> dict[str, Any]:
    """The device, and the versions of what ran."""
    device = jax.devices()[0]
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "driver": str(device.client.platform_version),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "sparse_attn": sparse_attn.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def _inputs(case: Case) -> tuple[np.ndarray, ...]:
    """Query, key, value, d_output `[tokens, heads, head_dim]` in the case's dtype, and segment ids `[tokens]`."""
    random = np.random.default_rng(0)
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    dtype = jnp.dtype(case.dtype)
    arrays = [random.standard_normal((case.tokens, number, case.head_dim)).astype(dtype) for number in heads]
    return *arrays, np.repeat(np.arange(len(case.lengths), dtype=np.int32), case.lengths)


@functools.cache
def _choice(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's choice, int32 `[heads, tokens, top_k]`, and whether it is decided `[heads, tokens]`."""
    query, key, *_ = _inputs(case)
    geometry, group = oracle.make_geometry(case.lengths, case.block_size), case.heads // case.kv_heads
    heads = [oracle.choose(query[:, h], key[:, h // group], geometry, case.top_k) for h in range(case.heads)]
    indices, decided = zip(*heads, strict=True)
    return np.stack(indices).astype(np.int32), np.stack(decided)


@functools.cache
def _expected(case: Case) -> dict[str, Any]:
    """The oracle's results: of all rows of a small case; else of some rows, and of the keys of one block of head 0."""
    query, key, value, d_output, _ = _inputs(case)
    indices, _ = _choice(case)
    geometry, group = oracle.make_geometry(case.lengths, case.block_size), case.heads // case.kv_heads
    block = len(geometry.block_start) * 7 // 8
    keys = np.arange(geometry.block_start[block], geometry.block_stop[block])
    rows: list[np.ndarray] = []
    results: dict[str, list[np.ndarray]] = {"output": [], "log_sum_exp": [], "d_query": []}
    sums = np.zeros((2, case.tokens, case.kv_heads, case.head_dim))
    for h in range(case.heads):
        chosen = np.flatnonzero((indices[h] == block).any(-1)) if h < group else np.array([], int)
        some = np.arange(case.tokens) if case.is_small else np.union1d(chosen, np.arange(h, case.tokens, 127))
        arrays = query[:, h], key[:, h // group], value[:, h // group], d_output[:, h]
        *by_row, d_key, d_value = oracle.attend(*arrays, indices[h], some, geometry)
        rows.append(some)
        for name, array in zip(("output", "log_sum_exp", "d_query"), (by_row[0], by_row[1], by_row[2]), strict=True):
            results[name].append(array)
        sums[:, :, h // group] += d_key, d_value
    place = (slice(None), slice(None)) if case.is_small else (keys, 0)
    return {"rows": rows, **results, "place": place, "d_key": sums[0][place], "d_value": sums[1][place]}


def check(case: Case, part: str, implementation: Any) -> dict[str, Any]:
    """Whether a part of a call is right: {"errors": by name, as a share of what is allowed, "same_bits": bool}."""
    *arrays, segment_ids = _inputs(case)
    query, key, value, d_output = (jnp.asarray(array[None]) for array in arrays)
    options: dict[str, Any] = {"is_causal": True, "implementation": implementation}
    if len(case.lengths) > 1:
        options["segment_ids"] = jnp.asarray(segment_ids[None])
    sizes: dict[str, Any] = {"block_size": case.block_size, "top_k": case.top_k}
    choice, decided = _choice(case)
    selection = sparse_attn.BlockSelection(jnp.asarray(choice[None]), case.block_size, int(choice.max()) + 1)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, selection: sparse_attn.BlockSelection) -> Any:
        call = sparse_attn.block_sparse_attention
        return call(query, key, value, selection, return_residual=True, **options)

    def gradients(query: jax.Array, key: jax.Array, value: jax.Array, selection: sparse_attn.BlockSelection) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, selection)[0], query, key, value)[1](d_output)

    calls: dict[str, Callable[..., Any]] = {
        "route": lambda query, key, *_: sparse_attn.route_moba(query, key, **sizes, **options).indices,
        "forward": attend,
        "gradients": gradients,
    }
    with jax.default_matmul_precision("highest" if case.dtype == "float32" else "default"):
        compiled = jax.jit(calls[part]).lower(query, key, value, selection).compile()
    results, again = (jax.tree.map(np.asarray, compiled(query, key, value, selection)) for _ in range(2))
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True)
    report: dict[str, Any] = {"same_bits": all(a.tobytes() == b.tobytes() for a, b in pairs)}
    if part == "route":
        wrong_rows = (np.sort(results[0], axis=-1) != choice).any(-1) & decided
        return report | {"errors": {"choice": float(wrong_rows.sum())}, "decided": float(decided.mean())}
    expected = _expected(case)

    def error(actual: np.ndarray, expected: np.ndarray) -> float:
        difference = np.abs(actual.astype(np.float64) - expected).max()
        return float(difference / (_TOLERANCE[case.dtype] * max(1.0, np.abs(expected).max())))

    def by_row(actual: np.ndarray, name: str) -> float:  # [tokens, heads, ...]
        heads = enumerate(zip(expected["rows"], expected[name], strict=True))
        return float(np.max([error(actual[rows, h], right) for h, (rows, right) in heads]))  # NaN stays

    first, *rest = (array[0] for array in results)
    if part == "forward":
        return report | {"errors": {"output": by_row(first, "output"), "log_sum_exp": by_row(rest[0], "log_sum_exp")}}
    by_key = {
        name: error(array[expected["place"]], expected[name])
        for name, array in zip(("d_key", "d_value"), rest, strict=True)
    }
    return report | {"errors": {"d_query": by_row(first, "d_query"), **by_key}}


def measure(implementation: Any, tokens: int, which: str) -> dict[str, Any]:
    """Time (seconds), temporary memory (bytes) and time to the first result of MoBA or dense attention."""
    is_cpu = jax.default_backend() == "cpu"
    heads, head_dim, dtype = (2, 64, jnp.float32) if is_cpu else (16, 128, jnp.bfloat16)
    shape = (1, tokens, heads, head_dim)
    arrays = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]
    if implementation == "dense":
        attend = dense_attention()
    else:
        sizes: dict[str, Any] = {"block_size": 64 if is_cpu else 128, "top_k": 8, "implementation": implementation}
        attend = functools.partial(sparse_attn.moba_attention, is_causal=True, **sizes)

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    jax.block_until_ready(arrays)
    start = time.perf_counter()
    compiled = jax.jit(attend if which == "forward" else both).lower(*arrays).compile()
    used: Any = compiled.memory_analysis()
    room = _free_bytes()
    if room is not None and used.temp_size_in_bytes > room:
        return {"left_out": f"needs {used.temp_size_in_bytes / 2**30:.1f} GiB beside inputs and outputs"}
    jax.block_until_ready(compiled(*arrays))
    first = time.perf_counter() - start
    seconds: list[float] = []
    while len(seconds) < 7 and sum(seconds) < 1:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": used.temp_size_in_bytes, "first_seconds": first}


def _free_bytes() -> int | None:
    """Memory that a call may take: half of what is free, so that nothing else suffers; None if nobody says."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
