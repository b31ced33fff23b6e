"""Tests and times the GPU kernels on this machine's GPU: `python -m experiments on_device --out FILE.json`.

Needs JAX and the repository, nothing else (pytest for the tests). Run it from the root of the repository. Steps:

1. The repository's numerical tests, with the kernels.
2. The kernels at the benchmark's sizes, on short sequences, against dense attention in float32.
3. Whether two runs give the same bits.
4. What the GPU reaches at most, measured: bytes per second of a copy, operations per second of a matrix product.
5. For every problem of `roofline.PROBLEMS`: forward, and forward with backward, with the time of each stage and the
   memory of each call, beside cuDNN's dense attention in the same process.

All numbers go to the JSON file, a table to the Markdown file beside it. Not yet run on a GPU.

A time is the wall-clock time of one call, launch included, until its results are ready. Memory is the peak of the
compiled call as XLA reports it: arguments, results and temporary buffers.
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

from experiments.kernels import roofline
from experiments.kernels.calls import dense_calls, is_right, make_arrays, make_calls, right_results, takes_choice
from experiments.kernels.roofline import Problem
from pallas_kernels.config import MOSAIC, TRITON, MosaicConfig, TritonConfig

Times = dict[str, float]
_REPEATS = 10
_CHECKED_TOKENS = 2048  # at most; `right_results` holds all logits
_SIZES: dict[str, TritonConfig | MosaicConfig] = {"triton": TRITON, "mosaic": MOSAIC}
_TESTS = {
    "triton": ("-k", "pallas", "tests/test_attention.py", "tests/test_gradients.py", "tests/test_routing.py"),
    "mosaic": ("tests/gpu/test_mosaic.py",),
}
_COLUMNS = (
    *("head_dim", "block / top_k", "tokens", "route", "schedule", "attend", "merge", "forward", "spread", "cuDNN"),
    *("gain", "both", "spread", "cuDNN", "gain", "memory", "memory, both", "attend: bandwidth", "failed"),
)


def main(options: list[str]) -> None:
    """The command; `options` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments on_device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"), help="the JSON file to write")
    parser.add_argument(
        "--backend", choices=tuple(_SIZES), default="triton", help="the attention kernels; routing is always Triton's"
    )
    parser.add_argument("--longest", type=int, default=1 << 19, help="longest sequence to measure (tokens)")
    parser.add_argument("--skip_tests", action="store_true", help="skip steps 1 and 2")
    arguments = parser.parse_args(options)
    if jax.default_backend() != "gpu":
        sys.exit("error: JAX finds no GPU. What the kernels should cost: python -m experiments roofline")
    problems = [problem for problem in roofline.PROBLEMS if problem.sequence <= arguments.longest]
    report: dict[str, Any] = {"machine": describe_machine(), "backend": arguments.backend}
    if not arguments.skip_tests:
        report["tests"] = run_tests(arguments.backend)
        short = dict.fromkeys(shortened(problem) for problem in problems)
        report["checks"] = {str(problem): check(problem, _SIZES[arguments.backend]) for problem in short}
    report["is_deterministic"] = is_deterministic(arguments.backend)
    report["ceilings"] = measure_ceilings()
    print(json.dumps(report, indent=1))
    report["problems"] = []
    for problem in problems:
        report["problems"].append(dataclasses.asdict(problem) | measure(problem, arguments.backend))
        arguments.out.write_text(json.dumps(report, indent=1))
        arguments.out.with_suffix(".md").write_text(table(report))
        print(row(report["problems"][-1], report["ceilings"]), flush=True)


def run_tests(backend: str) -> str:
    """Runs the repository's tests with the kernels on this GPU; returns pytest's last line."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # for the references
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", *_TESTS[backend]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:])
    return (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]


def shortened(problem: Problem) -> Problem:
    """The problem with few enough tokens for `right_results`."""
    return dataclasses.replace(problem, batch=1, sequence=min(problem.sequence, _CHECKED_TOKENS))


def describe_machine() -> dict[str, str]:
    """GPU, driver, clocks, and the versions of JAX and Python."""
    device = jax.devices()[0]
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        card = str(error)
    return {
        "device": device.device_kind,
        "card": card,
        "jax": jax.__version__,
        "platform": str(device.client.platform_version),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_seconds(function: Callable[..., Any], *arguments: Any) -> Times:
    """Median, minimum and maximum time of a compiled call (seconds), after a warm-up call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def measure_ceilings() -> dict[str, float]:
    """Bytes per second of a copy; operations per second of a bfloat16 product of two 8192 x 8192 matrices."""
    numbers = jnp.zeros(1 << 30, jnp.bfloat16)
    copy = measure_seconds(jax.jit(lambda x: x + 1), numbers)["median"]
    matrix = jnp.ones((8192, 8192), jnp.bfloat16)
    product = measure_seconds(jax.jit(jnp.matmul), matrix, matrix)["median"]
    return {"bytes_per_second": 2 * numbers.nbytes / copy, "flops_per_second": 2 * 8192**3 / product}


def check(problem: Problem, config: TritonConfig | MosaicConfig, interpret: bool = False) -> dict[str, bool]:
    """Whether routing, forward and backward give the right results on a short problem, by the name of the call."""
    arrays = make_arrays(problem)
    calls = make_calls(problem, config, interpret)
    expected = right_results(problem, arrays)
    return {
        name: is_right(jax.jit(calls[name])(*([arrays, expected["route"]] if takes_choice(name) else [arrays])), right)
        for name, right in expected.items()
    }


def is_deterministic(backend: str) -> bool:
    """Whether two runs of forward and backward give the same bits."""
    problem = roofline.PROBLEMS[0]
    call = jax.jit(make_calls(problem, _SIZES[backend])["whole_forward_backward"])
    arrays = make_arrays(problem)
    first, second = call(arrays), call(arrays)
    return all(bool((a == b).all()) for a, b in zip(first, second, strict=True))


def measure(problem: Problem, backend: str) -> dict[str, Any]:
    """Time and memory of every call, time and rates of every stage; the message of each call that failed."""
    arrays, calls = make_arrays(problem), make_calls(problem, _SIZES[backend]) | dense_calls()
    indices = jax.jit(calls["route"])(arrays)
    seconds: dict[str, Times] = {}
    memory: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        inputs = (arrays, indices) if takes_choice(name) else (arrays,)
        try:
            compiled = jax.jit(call).lower(*inputs).compile()
            used: Any = compiled.memory_analysis()
            memory[name] = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
            seconds[name] = measure_seconds(compiled, *inputs)
        except Exception as error:  # keep the other measurements
            failures[name] = str(error)[:300]
    stages = split_stages({name: times["median"] for name, times in seconds.items()})
    expected = {stage.name: stage for stage in roofline.forward_stages(problem)}
    expected["backward"] = roofline.total("backward", roofline.backward_stages(problem))
    rates = {
        name: {"bytes_per_second": expected[name].bytes / time, "flops_per_second": expected[name].tensor / time}
        for name, time in stages.items()
        if time > 0
    }
    return {"seconds": seconds, "stages": stages, "rates": rates, "memory": memory, "failures": failures}


def split_stages(seconds: Times) -> Times:
    """Seconds of each stage: the difference of two calls. A stage is left out if one of its calls was not timed."""
    differences = {
        "route": ("route", None),
        "schedule": ("schedule", None),
        "attend": ("schedule_attend", "schedule"),
        "merge": ("forward", "schedule_attend"),
        "backward": ("forward_backward", "forward"),
    }
    return {
        name: seconds[whole] - (seconds[part] if part else 0)
        for name, (whole, part) in differences.items()
        if whole in seconds and (part is None or part in seconds)
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine, ceilings = report["machine"], report["ceilings"]
    lines = [
        f"# {report['backend']} kernels on one {machine['device']}, {machine['date']}, JAX {machine['jax']}",
        "",
        f"Measured peaks: {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s. Times in milliseconds, medians of {_REPEATS} calls; "
        "spread is (maximum - minimum) / median. `forward` and `both` (forward with backward) include routing. "
        "`gain` is cuDNN's time over ours, `memory` our memory over cuDNN's (dense attention). `attend: bandwidth` is "
        "a share of the measured peak.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| ---: " * len(_COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(row(problem, ceilings) for problem in report["problems"])]) + "\n"


def row(problem: dict[str, Any], ceilings: dict[str, float]) -> str:
    """One row of the table; "-" where nothing was measured."""
    seconds, memory, stages = problem["seconds"], problem["memory"], problem["stages"]

    def times(call: str) -> list[str]:
        """Our time, its spread, cuDNN's time, the gain."""
        ours, dense = seconds.get(f"whole_{call}"), seconds.get(f"dense_{call}")
        spread = f"{100 * (ours['most'] - ours['least']) / ours['median']:.0f} %" if ours else "-"
        gain = f"{dense['median'] / ours['median']:.2f}" if ours and dense else "-"
        return [milliseconds(ours and ours["median"]), spread, milliseconds(dense and dense["median"]), gain]

    def memory_ratio(call: str) -> str:
        ours, dense = memory.get(f"whole_{call}"), memory.get(f"dense_{call}")
        return f"{ours / dense:.2f}" if ours and dense else "-"

    def milliseconds(time: float | None) -> str:
        return "-" if time is None else f"{1e3 * time:.2f}"

    rates = problem["rates"].get("attend")
    parts = [
        *(str(problem["head_dim"]), f"{problem['block_size']} / {problem['top_k']}", str(problem["sequence"])),
        *(milliseconds(stages.get(name)) for name in ("route", "schedule", "attend", "merge")),
        *times("forward"),
        *times("forward_backward"),
        *(memory_ratio("forward"), memory_ratio("forward_backward")),
        f"{100 * rates['bytes_per_second'] / ceilings['bytes_per_second']:.0f} %" if rates else "-",
        ", ".join(problem["failures"]) or "-",
    ]
    return f"| {' | '.join(parts)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
