"""One command for a lent or rented machine: `python -m experiments on_device --minutes 30 --out DIRECTORY`.

Needs JAX and the repository, nothing else. In order of value, each file written anew after every step, so that a
cut-off loses nothing:

1. verify.json, a third of the time at most: what is right (`experiments.kernels.verify`). The rest leaves out what is
   wrong.
2. tuning.json, half of the rest: sizes of each kernel, one changed at a time and kept if that is faster and gives the
   results of the XLA path.
3. NAME.json and NAME.md for each implementation that is right, the fastest first, with the best sizes found: what the
   machine reaches at most (bytes per second of a copy, operations per second of a matrix product), then for every
   problem of `roofline.PROBLEMS` forward, and forward with backward, with the time of each stage and the memory of each
   call, beside the platform's dense attention in the same process.

A time is the wall-clock time of one call, launch included, until its results are ready. Memory is the peak of the
compiled call as XLA reports it: arguments, results and temporary buffers. A call that hangs or crashes is reported, and
the rest is done. Not yet run on an accelerator.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels import roofline, verdict, verify
from experiments.kernels.calls import dense_calls, make_arrays, make_calls, takes_choice
from experiments.kernels.roofline import Problem
from experiments.kernels.steps import Step, run_steps
from pallas_kernels.config import MOSAIC, PER_QUERY, TRITON
from sparse_attn.attend.backends import Implementation, MosaicKernels, TpuKernels, TritonKernels

Times = dict[str, float]
_REPEATS = 10
_LONGEST_STEP = 120  # seconds
_TUNED = Problem(32768, 128, 8, 128)
_REHEARSED = Problem(sequence=48, block_size=16, top_k=2, head_dim=16, batch=1, heads=1)
# What is tried in the place of each default size, the one that promises most first.
_SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "TritonKernels": {
        "tile_size": (64,),
        "attend_warps": (4,),
        "num_stages": (3, 1),
        "key_size": (128, 32),
        "backward_tile_size": (128, 32),
        "route_queries": (128, 32),
        "route_blocks": (128, 32),
        "merge_rows": (64, 16),
    },
    "MosaicKernels": {"gather_in_kernel": (False,), "query_slots": (3,), "key_slots": (3,)},
    "TpuKernels": {
        "tile_size": (64, 256),
        "slots_per_step": (2048, 512),
        "backward_tile_size": (512, 128),
        "pieces_per_step": (256, 1024),
    },
}
# As a share of the largest number of the XLA path, at least of 1: both round tiles and results to 16 bits.
_TOLERANCE = 4e-2
_COLUMNS = (
    *("head_dim", "block / top_k", "tokens", "route", "schedule", "attend", "merge", "forward", "spread", "dense"),
    *("gain", "both", "spread", "dense", "gain", "memory", "memory, both", "attend: bandwidth", "failed"),
)


def main(options: list[str]) -> int:
    """The command; `options` are those of the command line. Returns the exit status, that of verify."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments on_device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop (minutes)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("on_device"), help="directory of the results")
    parser.add_argument(
        "--rehearse", action="store_true", help="interpret the Triton kernels on a CPU, at the smallest sizes alone"
    )
    arguments = parser.parse_args(options)
    out, rehearse = arguments.out, arguments.rehearse
    out.mkdir(parents=True, exist_ok=True)
    begin, budget = time.monotonic(), 60 * arguments.minutes
    report = verify.verify(begin + budget / 3, out / "verify.json", rehearse)
    print(verdict.table(report), flush=True)
    names = [name for name in verdict.right_names(report) if name != "reference"]
    names.sort(key=lambda name: name != report["implementation"])
    tuning = tune(report["about"].get("platform", ""), names, (begin + time.monotonic() + budget) / 2, out, rehearse)
    for name in names:
        remaining = begin + budget - time.monotonic()
        deadline = time.monotonic() + remaining / (len(names) - names.index(name))
        benchmark(report["about"], name, tuning.get(name, {}).get("sizes", {}), deadline, out, rehearse)
    return 1 if report["wrong"] else 0


def make_implementation(name: str, platform: str, sizes: dict[str, Any], rehearse: bool) -> Implementation:
    """The implementation of that name on a platform, as JAX names it, with some of its sizes changed."""
    if name == "xla":
        return "xla"
    if name == "mosaic":
        return MosaicKernels(dataclasses.replace(MOSAIC, **sizes))
    if platform == "tpu":
        return TpuKernels(dataclasses.replace(PER_QUERY, **sizes))
    return TritonKernels(dataclasses.replace(TRITON, **sizes), interpret=rehearse)


def tune(platform: str, names: list[str], deadline: float, out: pathlib.Path, rehearse: bool) -> dict[str, Any]:
    """The best sizes found, by implementation, and all that was tried."""
    report: dict[str, Any] = {}
    for name in names:
        kind = type(make_implementation(name, platform, {}, rehearse)).__name__
        if kind in _SIZES:
            report[name] = {"sizes": {}, "seconds": None, "tried": []}
            shared = {"kind": "tune", "implementation": name, "platform": platform, "rehearse": rehearse}
            trials = _trials(report[name], shared, _SIZES[kind])
            for step, outcome in run_steps(run_step, trials, _LONGEST_STEP, deadline):
                _note(report[name], step["sizes"], outcome)
                (out / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
            print(f"tuned {name}: {report[name]['sizes'] or 'the default sizes'}", flush=True)
    return report


def _trials(found: dict[str, Any], shared: Step, sizes: dict[str, tuple[Any, ...]]) -> Iterator[Step]:
    """The default sizes, then the best so far with one size changed."""
    yield shared | {"sizes": {}}
    for name, values in list(sizes.items())[: 1 if shared["rehearse"] else None]:
        for value in values:
            yield shared | {"sizes": found["sizes"] | {name: value}}


def _note(found: dict[str, Any], sizes: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Keeps what is right and faster than all before."""
    found["tried"].append({"sizes": sizes, **outcome})
    seconds = outcome.get("seconds")
    if seconds is not None and outcome["is_right"] and (found["seconds"] is None or seconds < found["seconds"]):
        found.update(sizes=sizes, seconds=seconds)


def benchmark(
    about: dict[str, Any], name: str, sizes: dict[str, Any], deadline: float, out: pathlib.Path, rehearse: bool
) -> None:
    """Measures every problem, the ceilings first; writes NAME.json and NAME.md after each."""
    machine = {"device": about["device_kind"], **about}
    report: dict[str, Any] = {"machine": machine, "backend": name, "sizes": sizes, "ceilings": {}, "problems": []}
    shared = {"implementation": name, "platform": about["platform"], "sizes": sizes, "rehearse": rehearse}
    problems = (_REHEARSED,) if rehearse else roofline.PROBLEMS
    steps = [shared | {"kind": "ceilings"}]
    steps += [shared | {"kind": "benchmark", "problem": dataclasses.asdict(problem)} for problem in problems]
    for step, outcome in run_steps(run_step, steps, _LONGEST_STEP, deadline):
        if step["kind"] == "ceilings":
            report["ceilings"] = outcome
        elif "seconds" in outcome:
            report["problems"].append(step["problem"] | outcome)
        else:
            report.setdefault("not_measured", []).append(step["problem"] | outcome)
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / f"{name}.md").write_text(table(report))
    print(table(report), flush=True)


def run_step(step: Step) -> dict[str, Any]:
    """One step, in a process of its own."""
    if step["kind"] == "ceilings":
        return measure_ceilings(256 if step["rehearse"] else 8192)
    implementation = make_implementation(step["implementation"], step["platform"], step["sizes"], step["rehearse"])
    if step["kind"] == "tune":
        return try_sizes(_REHEARSED if step["rehearse"] else _TUNED, implementation)
    return measure(Problem(**step["problem"]), implementation)


def try_sizes(problem: Problem, implementation: Implementation) -> dict[str, Any]:
    """Seconds of forward and backward, and whether the gradients over XLA's choice are those of the XLA path."""
    arrays, indices, expected = _xla_results(problem)
    calls = make_calls(problem, implementation)
    actual = jax.jit(calls["forward_backward"])(arrays, indices)
    times = measure_seconds(jax.jit(calls["whole_forward_backward"]), arrays)
    return {"seconds": times["median"], "is_right": is_close(actual, expected)}


@functools.cache
def _xla_results(problem: Problem) -> tuple[dict[str, jax.Array], jax.Array, Any]:
    """Arrays, choice and gradients."""
    arrays, calls = make_arrays(problem), make_calls(problem, "xla")
    indices = jax.jit(calls["route"])(arrays)
    return arrays, indices, jax.jit(calls["forward_backward"])(arrays, indices)


def is_close(actual: Iterable[jax.Array], expected: Iterable[jax.Array]) -> bool:
    """Whether 16-bit results agree up to rounding; NaN does not."""

    def agree(actual: jax.Array, expected: jax.Array) -> bool:
        expected = expected.astype(jnp.float32)
        error = jnp.abs(actual.astype(jnp.float32) - expected).max()
        return bool(error <= _TOLERANCE * jnp.maximum(1, jnp.abs(expected).max()))

    return all(agree(*pair) for pair in zip(actual, expected, strict=True))


def measure_seconds(function: Callable[..., Any], *arguments: Any) -> Times:
    """Median, minimum and maximum time of a compiled call (seconds), after a warm-up call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def measure_ceilings(size: int) -> dict[str, float]:
    """Bytes per second of a copy, operations per second of a bfloat16 product of two square matrices of that size."""
    numbers = jnp.zeros(16 * size * size, jnp.bfloat16)
    copy = measure_seconds(jax.jit(lambda x: x + 1), numbers)["median"]
    matrix = jnp.ones((size, size), jnp.bfloat16)
    product = measure_seconds(jax.jit(jnp.matmul), matrix, matrix)["median"]
    return {"bytes_per_second": 2 * numbers.nbytes / copy, "flops_per_second": 2 * size**3 / product}


def measure(problem: Problem, implementation: Implementation) -> dict[str, Any]:
    """Time and memory of every call, time and rates of every stage; the message of each call that failed."""
    arrays, calls = make_arrays(problem), make_calls(problem, implementation) | dense_calls()
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
    peaks = "not measured"
    if "flops_per_second" in ceilings:
        peaks = f"{ceilings['bytes_per_second'] / 1e12:.2f} TB/s, {ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s"
    lines = [
        f"# {report['backend']} on one {machine['device']}, {machine['date']}, JAX {machine['jax']}",
        "",
        f"Sizes other than the defaults: {report['sizes'] or 'none'}. Measured peaks: {peaks}. Times in milliseconds, "
        f"medians of {_REPEATS} calls; "
        "spread is (maximum - minimum) / median. `forward` and `both` (forward with backward) include routing. "
        "`dense` is the platform's dense attention, `gain` its time over ours, `memory` our memory over its. "
        "`attend: bandwidth` is a share of the measured peak.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| ---: " * len(_COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(row(problem, ceilings) for problem in report["problems"])]) + "\n"


def row(problem: dict[str, Any], ceilings: dict[str, float]) -> str:
    """One row of the table; "-" where nothing was measured."""
    seconds, memory, stages = problem["seconds"], problem["memory"], problem["stages"]

    def times(call: str) -> list[str]:
        """Our time, its spread, dense attention's time, the gain."""
        ours, dense = seconds.get(f"whole_{call}"), seconds.get(f"dense_{call}")
        spread = f"{100 * (ours['most'] - ours['least']) / ours['median']:.0f} %" if ours else "-"
        gain = f"{dense['median'] / ours['median']:.2f}" if ours and dense else "-"
        return [milliseconds(ours and ours["median"]), spread, milliseconds(dense and dense["median"]), gain]

    def memory_ratio(call: str) -> str:
        ours, dense = memory.get(f"whole_{call}"), memory.get(f"dense_{call}")
        return f"{ours / dense:.2f}" if ours and dense else "-"

    def milliseconds(time: float | None) -> str:
        return "-" if time is None else f"{1e3 * time:.2f}"

    rates, peak = problem["rates"].get("attend"), "bytes_per_second" in ceilings
    parts = [
        *(str(problem["head_dim"]), f"{problem['block_size']} / {problem['top_k']}", str(problem["sequence"])),
        *(milliseconds(stages.get(name)) for name in ("route", "schedule", "attend", "merge")),
        *times("forward"),
        *times("forward_backward"),
        *(memory_ratio("forward"), memory_ratio("forward_backward")),
        f"{100 * rates['bytes_per_second'] / ceilings['bytes_per_second']:.0f} %" if rates and peak else "-",
        ", ".join(problem["failures"]) or "-",
    ]
    return f"| {' | '.join(parts)} |"
