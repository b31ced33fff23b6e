"""Tests and benchmark of the GPU kernels on the GPU at hand: `python -m pallas_kernels.gpu.on_device --out FILE.json`.

In this order: the numerical tests of the repository with the kernels (from the repository's root); the kernels at the
sizes of the benchmark, short sequences, against dense products in float32; whether two runs give the same bits; the
measured ceilings of the chip; then, for every problem of `roofline.PROBLEMS`, forward and forward + backward with the
time of each stage and the memory of each call, beside cuDNN's dense attention in the same run. Everything goes into the
JSON file, a table into the Markdown file beside it. This script has not been run on a GPU yet.

`--backend mosaic` measures the Mosaic kernels, with Triton's router. `--tune` instead tries sizes of the Triton kernels
and writes the table that they read (`tuning`). Without a GPU the script prints the roofline by arithmetic
(`docs/gpu-roofline.md`) and measures nothing.

Times are wall-clock times of one call, launches included, until its results are there. Memory is what the compiled call
holds at most, by XLA's own account: arguments, results and temporary buffers.
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

from pallas_kernels.config import MOSAIC, MosaicConfig, TritonConfig
from pallas_kernels.gpu import roofline
from pallas_kernels.gpu.calls import dense_calls, is_right, make_arrays, make_calls, right_results, takes_choice
from pallas_kernels.gpu.roofline import Problem
from pallas_kernels.gpu.tuner import shortened, tune
from pallas_kernels.gpu.tuning import TABLE, make_entry, tuned, write_entry

Times = dict[str, float]
_REPEATS = 10
_TUNED_TOKENS = 65536
_TESTS = {
    "triton": ("-k", "pallas", "tests/test_attention.py", "tests/test_gradients.py", "tests/test_routing.py"),
    "mosaic": ("tests/gpu/test_mosaic.py",),
}
_COLUMNS = (
    *("head_dim", "block / top_k", "tokens", "route", "schedule", "attend", "merge", "forward", "spread", "cuDNN"),
    *("gain", "both", "spread", "cuDNN", "gain", "memory", "memory, both", "attend: memory's rate", "failed"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"), help="the JSON file to write")
    parser.add_argument("--backend", choices=("triton", "mosaic"), default="triton", help="the kernels that attend")
    parser.add_argument("--longest", type=int, default=1 << 19, help="skip longer sequences")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--tune", action="store_true", help="fill the table of sizes instead")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(roofline.table(), end="")
        return
    if arguments.tune:
        fill_table()
        return
    problems = [problem for problem in roofline.PROBLEMS if problem.sequence <= arguments.longest]
    report: dict[str, Any] = {"machine": describe_machine(), "backend": arguments.backend}
    if not arguments.skip_tests:
        report["tests"] = run_tests(arguments.backend)
        report["checks"] = {str(problem): check(problem, arguments.backend) for problem in _shapes(shortened)}
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
    """Runs the repository's tests with the kernels on this GPU; returns their closing line."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # of what the kernels are compared with
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", *_TESTS[backend]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:])
    return (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]


def fill_table() -> None:
    """Tunes every shape of the benchmark at one length and writes the table after each."""
    for problem in _shapes(lambda problem: dataclasses.replace(problem, sequence=_TUNED_TOKENS)):
        config, times, default_times = tune(problem, lambda *call: measure_seconds(*call)["median"])
        machine = describe_machine()
        key: dict[str, Any] = {name: getattr(problem, name) for name in ("head_dim", "block_size", "top_k", "sequence")}
        key |= {name: machine[name] for name in ("device", "date", "jax")}
        entry = make_entry(config, **key, milliseconds=times, default_milliseconds=default_times)
        write_entry(TABLE, entry)
        print(json.dumps(entry), flush=True)


def _shapes(change: Callable[[Problem], Problem]) -> list[Problem]:
    """The problems of the benchmark after a change, each once."""
    return list(dict.fromkeys(map(change, roofline.PROBLEMS)))


def sizes(problem: Problem, backend: str) -> TritonConfig | MosaicConfig:
    """What the kernels of a backend take."""
    return MOSAIC if backend == "mosaic" else tuned(problem.head_dim, problem.block_size, problem.top_k)


def describe_machine() -> dict[str, str]:
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
    """Median, least and most of the times of a compiled call, after one that does not count."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of a 16-bit product of matrices of 8192 x 8192."""
    numbers = jnp.zeros(1 << 30, jnp.bfloat16)
    copy = measure_seconds(jax.jit(lambda x: x + 1), numbers)["median"]
    matrix = jnp.ones((8192, 8192), jnp.bfloat16)
    product = measure_seconds(jax.jit(jnp.matmul), matrix, matrix)["median"]
    return {"bytes_per_second": 2 * numbers.nbytes / copy, "flops_per_second": 2 * 8192**3 / product}


def check(problem: Problem, backend: str) -> dict[str, bool]:
    """Whether each call gives the right results; `problem` is a short one."""
    arrays = make_arrays(problem)
    calls = make_calls(problem, sizes(problem, backend))
    expected = right_results(problem, arrays)
    return {
        name: is_right(jax.jit(calls[name])(*([arrays, expected["route"]] if takes_choice(name) else [arrays])), right)
        for name, right in expected.items()
    }


def is_deterministic(backend: str) -> bool:
    """Whether two runs of forward and backward give the same bits."""
    problem = roofline.PROBLEMS[0]
    call = jax.jit(make_calls(problem, sizes(problem, backend))["whole_forward_backward"])
    arrays = make_arrays(problem)
    first, second = call(arrays), call(arrays)
    return all(bool((a == b).all()) for a, b in zip(first, second, strict=True))


def measure(problem: Problem, backend: str) -> dict[str, Any]:
    """Seconds of calls and of stages, bytes of calls; a failure is kept as its text."""
    arrays, calls = make_arrays(problem), make_calls(problem, sizes(problem, backend)) | dense_calls()
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
        except Exception as error:  # one call that fails must not lose the others
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
    """Seconds of the stages, by differences of calls; of those whose calls there are."""
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
    """The report as a page of Markdown."""
    machine, ceilings = report["machine"], report["ceilings"]
    lines = [
        f"# {report['backend']} kernels on one {machine['device']}, {machine['date']}, JAX {machine['jax']}",
        "",
        f"Measured ceilings: {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s. Times in milliseconds, medians of {_REPEATS}; spread is "
        "(most - least) / median. `forward` and `both` (forward and backward) include routing; gain and memory are "
        "against cuDNN's dense attention.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| ---: " * len(_COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(row(problem, ceilings) for problem in report["problems"])]) + "\n"


def row(problem: dict[str, Any], ceilings: dict[str, float]) -> str:
    """One line of the table; "-" for what was not measured."""
    seconds, memory, stages = problem["seconds"], problem["memory"], problem["stages"]

    def times(call: str) -> list[str]:
        """Ours, its spread, cuDNN's, how many times faster ours is."""
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
    main()
