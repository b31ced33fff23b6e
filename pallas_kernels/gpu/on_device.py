"""Tests and benchmark of the GPU kernels on the GPU at hand: `python -m pallas_kernels.gpu.on_device --out FILE.json`.

In this order: the numerical tests of the repository with the kernels (from the repository's root); whether two runs
give the same bits; the measured ceilings of the chip; then, for every problem of `roofline.PROBLEMS`, forward and
forward + backward with the time of each stage and the memory of each call, beside cuDNN's dense attention in the same
run. Everything goes into the JSON file; a table is printed. This script has not been run on a GPU yet.

Without a GPU it prints the roofline by arithmetic (`docs/gpu-roofline.md`) and measures nothing.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.config import TRITON
from pallas_kernels.gpu import roofline
from pallas_kernels.gpu.backward import attend_backward
from pallas_kernels.gpu.chunks import Chunk, for_chunks
from pallas_kernels.gpu.forward import attend_chunks, attend_forward
from pallas_kernels.gpu.roofline import Problem
from pallas_kernels.gpu.routing import route

_REPEATS = 10
_TESTS = ("tests/test_attention.py", "tests/test_gradients.py", "tests/test_routing.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"), help="the JSON file to write")
    parser.add_argument("--longest", type=int, default=1 << 19, help="skip longer sequences")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(roofline.table(), end="")
        return
    tests = None if arguments.skip_tests else run_tests()
    report: dict[str, Any] = {"machine": describe_machine(), "tests": tests, "is_deterministic": is_deterministic()}
    report["ceilings"] = measure_ceilings()
    print(json.dumps(report, indent=1))
    report["problems"] = []
    for problem in roofline.PROBLEMS:
        if problem.sequence <= arguments.longest:
            report["problems"].append(dataclasses.asdict(problem) | measure(problem))
            arguments.out.write_text(json.dumps(report, indent=1))
            print(line(report["problems"][-1], report["ceilings"]), flush=True)


def run_tests() -> str:
    """Runs the repository's tests with the kernels on this GPU; returns their closing line."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # of what the kernels are compared with
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", "pallas", *_TESTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:])
    return (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]


def describe_machine() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "platform": str(device.client.platform_version),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Median time of a compiled call, after one that does not count."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of a 16-bit product of matrices of 8192 x 8192."""
    numbers = jnp.zeros(1 << 30, jnp.bfloat16)
    copy = median_seconds(jax.jit(lambda x: x + 1), numbers)
    matrix = jnp.ones((8192, 8192), jnp.bfloat16)
    product = median_seconds(jax.jit(jnp.matmul), matrix, matrix)
    return {"bytes_per_second": 2 * numbers.nbytes / copy, "flops_per_second": 2 * 8192**3 / product}


def make_arrays(problem: Problem) -> dict[str, jax.Array]:
    """Random query, key, value and gradient of the output; the places of blocks in full causal sequences."""
    shape = (problem.batch, problem.sequence, problem.heads, problem.head_dim)
    names = ("query", "key", "value", "d_output")
    arrays = {name: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed, name in enumerate(names)}
    place = np.arange(problem.sequence, dtype=np.int32)
    rows = {
        "block_start": place[:: problem.block_size],
        "block_length": np.full(problem.num_blocks, problem.block_size, np.int32),
        "first_block": np.zeros_like(place),
        "last_block": place // problem.block_size,
        "key_stop": place + 1,
    }
    return arrays | {name: jnp.broadcast_to(row, (problem.batch, row.size)) for name, row in rows.items()}


def make_functions(problem: Problem) -> dict[str, Callable[..., Any]]:
    """The calls to measure, of the arrays of `make_arrays` and, but for "route", the choice."""
    block_size, scale = problem.block_size, problem.head_dim**-0.5

    def choose(a: dict[str, jax.Array]) -> jax.Array:
        names = ("block_start", "block_length", "first_block", "last_block")
        places: dict[str, Any] = {name: a[name] for name in names}
        return route(a["query"], a["key"], **places, block_size=block_size, top_k=problem.top_k, is_causal=True)

    def options(a: dict[str, jax.Array]) -> dict[str, Any]:
        places: dict[str, Any] = {name: a[name] for name in ("block_start", "block_length", "key_stop")}
        return {**places, "block_size": block_size, "is_packed": False, "scale": scale}

    def attend(a: dict[str, jax.Array], indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attend_forward(a["query"], a["key"], a["value"], indices, **options(a))

    def attend_only(a: dict[str, jax.Array], indices: jax.Array) -> jax.Array:
        """Schedule and attention without the merge; of each chunk one number is kept."""
        plan, partials = attend_chunks(a["query"], a["key"], a["value"], indices, **options(a))

        def keep(chunk: Chunk, total: jax.Array) -> jax.Array:
            output, log_sum_exp = partials(chunk)
            return total + output[0, 0].astype(jnp.float32) + log_sum_exp[0]

        return for_chunks(plan, indices, TRITON.tile_size, keep, jnp.float32(0))

    def schedule_only(a: dict[str, jax.Array], indices: jax.Array) -> jax.Array:
        plan, _ = attend_chunks(a["query"], a["key"], a["value"], indices, **options(a))

        def keep(chunk: Chunk, total: jax.Array) -> jax.Array:
            return total + chunk.schedule.pair.sum() + chunk.schedule.block.sum()

        return for_chunks(plan, indices, TRITON.tile_size, keep, jnp.int32(0))

    def differentiate(a: dict[str, jax.Array], indices: jax.Array) -> tuple[jax.Array, ...]:
        output, log_sum_exp = attend(a, indices)
        results = output, log_sum_exp, a["d_output"], jnp.zeros_like(log_sum_exp)
        return attend_backward(a["query"], a["key"], a["value"], indices, *results, **options(a))

    def dense(a: dict[str, jax.Array]) -> jax.Array:
        arrays = a["query"], a["key"], a["value"]
        return jax.nn.dot_product_attention(*arrays, is_causal=True, implementation="cudnn")

    def dense_gradients(a: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return dense(a | {"query": query, "key": key, "value": value})

        return jax.vjp(attend, a["query"], a["key"], a["value"])[1](a["d_output"])

    return {
        "route": choose,
        "schedule": schedule_only,
        "attend": attend_only,
        "forward": attend,
        "forward_backward": differentiate,
        "whole_forward": lambda a: attend(a, choose(a)),
        "whole_forward_backward": lambda a: differentiate(a, choose(a)),
        "dense_forward": dense,
        "dense_forward_backward": dense_gradients,
    }


def is_deterministic() -> bool:
    """Whether two runs of forward and backward give the same bits."""
    problem = roofline.PROBLEMS[0]
    call = jax.jit(make_functions(problem)["whole_forward_backward"])
    arrays = make_arrays(problem)
    first, second = call(arrays), call(arrays)
    return all(bool((a == b).all()) for a, b in zip(first, second, strict=True))


def measure(problem: Problem) -> dict[str, Any]:
    """Milliseconds of stages and calls, bytes of calls; a failure is kept as its text."""
    arrays, functions = make_arrays(problem), make_functions(problem)
    indices = jax.jit(functions["route"])(arrays)
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, function in functions.items():
        takes_choice = name in ("schedule", "attend", "forward", "forward_backward")
        inputs = (arrays, indices) if takes_choice else (arrays,)
        try:
            compiled = jax.jit(function).lower(*inputs).compile()
            used: Any = compiled.memory_analysis()
            memory[name] = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
            seconds[name] = median_seconds(compiled, *inputs)
        except Exception as error:  # one call that fails must not lose the others
            failures[name] = str(error)[:300]
    stages = {}
    if {"route", "schedule", "attend", "forward", "forward_backward"} <= seconds.keys():
        stages = {  # by difference, but for the first two
            "route": seconds["route"],
            "schedule": seconds["schedule"],
            "attend": seconds["attend"] - seconds["schedule"],
            "merge": seconds["forward"] - seconds["attend"],
            "backward": seconds["forward_backward"] - seconds["forward"],
        }
    expected = {stage.name: stage for stage in roofline.forward_stages(problem)}
    rates = {
        name: {"bytes_per_second": expected[name].bytes / time, "flops_per_second": expected[name].tensor / time}
        for name, time in stages.items()
        if name in expected and time > 0
    }
    return {"seconds": seconds, "stages": stages, "rates": rates, "memory": memory, "failures": failures}


def line(row: dict[str, Any], ceilings: dict[str, float]) -> str:
    """One problem in a line: times in ms, gain over cuDNN, memory over cuDNN's, share of the memory's measured rate."""

    def ratio(numbers: dict[str, float], above: str, below: str) -> str:
        return f"{numbers[above] / numbers[below]:.2f}" if {above, below} <= numbers.keys() else "-"

    seconds = row["seconds"]
    parts = [f"d={row['head_dim']} {row['block_size']}/{row['top_k']} {row['sequence']}:"]
    parts += [f"{name} {1e3 * time:.2f}" for name, time in row["stages"].items()]
    parts += [f"{name} {1e3 * seconds[name]:.2f}" for name in ("whole_forward", "dense_forward") if name in seconds]
    parts.append("gain " + ratio(seconds, "dense_forward", "whole_forward"))
    parts.append("with gradients " + ratio(seconds, "dense_forward_backward", "whole_forward_backward"))
    parts.append("memory " + ratio(row["memory"], "whole_forward", "dense_forward"))
    if "attend" in row["rates"]:
        share = row["rates"]["attend"]["bytes_per_second"] / ceilings["bytes_per_second"]
        parts.append(f"attend at {100 * share:.0f} % of the memory's rate")
    return " ".join(parts + [f"{name} FAILED" for name in row["failures"]])


if __name__ == "__main__":
    main()
