"""Time and memory over sequence length, against dense attention: ratios measured in turns in one process.

On a CPU that process has one JAX device a core, as far as the heads divide, and both MoBA and dense attention get their
heads spread over the devices: XLA runs much of a program on one thread a device. MoBA on one device is timed as well.
"""

import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.preset import EfficiencyConfig, Preset
from experiments.studies.variants import write_study
from sparse_attn import moba_attention

_NAMES = "moba", "one_device", "dense", "torch"
_REST = 0.25  # seconds between measurements: the threads of other libraries go on spinning for a while after a call


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Measures the preset's lengths; writes efficiency/study.json."""
    settings = dataclasses.asdict(preset.efficiency)
    return write_study(out, "efficiency", preset.name, settings, lambda: measure(preset.efficiency))


def measure(config: EfficiencyConfig) -> dict[str, Any]:
    """A row for each length and pass: medians and interquartile ranges (ms), ratios of medians, memory (MiB).

    Arithmetic counted as useful: 4 d for each (query, key) that the pass must look at (2 products of 2 d), times 3.5
    with the backward pass (7 products instead of 2); for MoBA all keys of the chosen blocks.
    """
    return in_fresh_process(_measure, config)


def _measure(config: EfficiencyConfig) -> dict[str, Any]:
    """What `measure` returns, in a process of its own."""
    _use_cores_as_devices(config)
    rows = []
    for length in tqdm(config.sequence_lengths, desc="efficiency", unit="length"):
        for is_training in (False, True):
            rows.append(_measure_row(config, length, is_training))
    return {"rows": rows, "machine": describe_machine()}


def table(numbers: dict[str, Any]) -> str:
    """The rows as text, the machine below."""

    def show(value: float | None, spread: float | None = None) -> str:
        return "-" if value is None else f"{value:.1f}" if spread is None else f"{value:.1f} ±{spread / 2:.1f}"

    head: tuple[str, ...] = ("tokens", "pass", "moba ms", "1 device ms", "dense ms", "torch ms", "x dense", "x torch")
    head += ("moba first", "dense first", "moba MiB", "dense MiB", "moba peak", "dense peak", "GFLOP/s", "% limit")
    lines: list[tuple[str, ...]] = [head]
    for row in numbers["rows"]:
        times = [show(row[f"{name}_ms"], row[f"{name}_iqr_ms"]) for name in _NAMES]
        ratios = [show(row["speedup_over_dense"]), show(row["speedup_over_torch"])]
        first = [show(row[f"{name}_first_ms"]) for name in ("moba", "dense")]
        memory = [show(row[f"{name}_{kind}_mib"]) for kind in ("temp", "peak") for name in ("moba", "dense")]
        speed = row["achieved_gflops"]
        share = f"{speed / numbers['machine']['matmul_gflops']:.0%}"
        lines.append((str(row["sequence_length"]), row["pass"], *times, *ratios, *first, *memory, show(speed), share))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    machine = ", ".join(f"{key} {value}" for key, value in {**numbers["machine"], **numbers["about"]}.items())
    return (
        f"{text}\n\nms: median ± half the interquartile range, heads spread over the devices; 1 device: MoBA on one. "
        f"First: ms until the first result, tracing and compiling included. "
        f"MiB: temporary memory as compiled; peak: growth of a fresh process by one call. % limit: of one large matrix "
        f"product, matmul_gflops.\n{machine}"
    )


def _measure_row(config: EfficiencyConfig, length: int, is_training: bool) -> dict[str, Any]:
    inputs, attention, sharding = _draw_inputs(config, length), _contestants(config), _head_sharding(config.num_heads)
    spread_inputs = jax.device_put(inputs, sharding)
    if length > (config.longest_dense_backward if is_training else config.longest_dense):
        del attention["dense"]
    calls: dict[str, Callable[[], Any]] = {}
    memory: dict[str, float] = {}
    first: dict[str, float] = {}
    for name, function in attention.items():
        start = time.perf_counter()
        compiled = _compile(_over_heads(function, sharding), spread_inputs, is_training)
        _call(compiled, spread_inputs)
        first[name] = 1e3 * (time.perf_counter() - start)
        calls[name] = functools.partial(_call, compiled, spread_inputs)
        used: Any = compiled.memory_analysis()
        memory[name] = sharding.num_devices * used.temp_size_in_bytes / 2**20
    if sharding.num_devices > 1:
        calls["one_device"] = functools.partial(_call, _compile(attention["moba"], inputs, is_training), inputs)
    is_comparable = not is_training and config.dtype == "float32" and jax.default_backend() == "cpu"
    if config.torch and is_comparable and importlib.util.find_spec("torch"):
        calls["torch"] = _torch_call(inputs)
    times = time_in_turns(calls, config.repeats)
    median = {name: float(np.median(seconds)) * 1e3 for name, seconds in times.items()}
    spread = {name: float(np.subtract(*np.percentile(seconds, [75, 25]))) * 1e3 for name, seconds in times.items()}

    blocks = np.minimum(np.arange(length) // config.block_size + 1, config.top_k)  # chosen by each query
    pairs = config.batch_size * config.num_heads * float(blocks.sum()) * config.block_size
    flops = 4 * config.head_dim * pairs * (3.5 if is_training else 1)
    row: dict[str, Any] = {"sequence_length": length, "pass": "forward+backward" if is_training else "forward"}
    for name in _NAMES:
        row |= {f"{name}_ms": median.get(name), f"{name}_iqr_ms": spread.get(name)}
    for name in ("dense", "torch"):
        row[f"speedup_over_{name}"] = median[name] / median["moba"] if name in median else None
    row |= {f"{name}_first_ms": first.get(name) for name in ("moba", "dense")}
    row |= {f"{name}_temp_mib": memory.get(name) for name in ("moba", "dense")}
    for name in ("moba", "dense"):
        is_longest = length == max(config.sequence_lengths)  # a fresh process takes seconds to start
        row[f"{name}_peak_mib"] = (
            in_fresh_process(_measure_peak, config, length, is_training, name)
            if is_longest and name in attention
            else None
        )
    return row | {"achieved_gflops": flops / median["moba"] / 1e6}


def _contestants(config: EfficiencyConfig) -> dict[str, Callable[..., jax.Array]]:
    return {
        "moba": functools.partial(moba_attention, block_size=config.block_size, top_k=config.top_k, is_causal=True),
        "dense": functools.partial(jax.nn.dot_product_attention, is_causal=True),
    }


def _use_cores_as_devices(config: EfficiencyConfig) -> None:
    """Gives JAX as many CPU devices as there are cores, if the heads divide by that; before anything else is asked."""
    jax.config.update("jax_num_cpu_devices", math.gcd(config.num_heads, os.cpu_count() or 1))


def _head_sharding(num_heads: int) -> NamedSharding:
    """Heads of `[batch, tokens, heads, head_dim]` over as many devices as divide them."""
    devices = jax.devices()[: math.gcd(num_heads, jax.device_count())]
    return NamedSharding(
        jax.make_mesh((len(devices),), ("heads",), devices=devices), PartitionSpec(None, None, "heads")
    )


def _over_heads(
    function: Callable[..., jax.Array], sharding: NamedSharding
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The attention function with every device working on its own heads, which never meet."""
    mesh, spec = sharding.mesh, sharding.spec
    return jax.shard_map(function, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def _draw_inputs(config: EfficiencyConfig, length: int) -> list[jax.Array]:
    shape = (config.batch_size, length, config.num_heads, config.head_dim)
    return [jax.random.normal(key, shape, config.dtype) for key in jax.random.split(jax.random.key(0), 3)]


def _compile(function: Callable[..., jax.Array], inputs: list[jax.Array], is_training: bool) -> jax.stages.Compiled:
    return jax.jit(_with_backward(function) if is_training else function).lower(*inputs).compile()


def _measure_peak(config: EfficiencyConfig, length: int, is_training: bool, name: str) -> float | None:
    """Growth of the largest resident size of this fresh process by one call, its result included (MiB); Linux alone."""
    _use_cores_as_devices(config)
    sharding = _head_sharding(config.num_heads)
    inputs = jax.device_put(_draw_inputs(config, length), sharding)
    compiled = _compile(_over_heads(_contestants(config)[name], sharding), inputs, is_training)
    before = _largest_resident_kib()
    _call(compiled, inputs)
    after = _largest_resident_kib()
    return None if before is None or after is None else (after - before) / 1024


def _largest_resident_kib() -> int | None:
    """From /proc: getrusage would count what the parent process held when this one was started."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _with_backward(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def loss(*inputs: jax.Array) -> jax.Array:
        return function(*inputs).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def _call(compiled: Callable[..., Any], inputs: list[jax.Array]) -> None:
    jax.block_until_ready(compiled(*inputs))


def _torch_call(inputs: list[jax.Array]) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    tensors = [torch.from_numpy(np.array(array)).transpose(1, 2).contiguous() for array in inputs]
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, *tensors, is_causal=True)


def time_in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, measured a b c a b c ..., so that a slow moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(_REST)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def describe_machine() -> dict[str, Any]:
    """The processor, and what it reaches in one large float32 product: the ceiling of everything above."""
    size = 2048
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = time_in_turns({"product": functools.partial(_call, product, [matrix, matrix])}, 7)["product"]
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line]
        if cpu.exists()
        else []
    )
    machine = {
        "devices": jax.device_count(),
        "cpu_model": names[0] if names else platform.processor(),
        "matmul_gflops": round(2 * size**3 / float(np.median(seconds)) / 1e9),
    }
    if importlib.util.find_spec("torch"):
        import torch

        machine |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    return machine
