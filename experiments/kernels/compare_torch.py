"""PyTorch's flash attention on the problems of a report: `python -m experiments compare_torch gpu.json`.

Run it after `on_device`, on the same machine, in an environment with PyTorch, and give it the JSON file that
`on_device` wrote. It times dense causal attention (`torch.nn.functional.scaled_dot_product_attention`, flash backend,
bfloat16) with CUDA events, and writes a JSON file and a Markdown table with our times beside PyTorch's. It does not
import JAX, which would reserve GPU memory. Not yet run on a GPU.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

_REPEATS = 10
_CALLS = ("forward", "forward_backward")


def main(options: list[str]) -> None:
    """The command; `options` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments compare_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", type=pathlib.Path, help="the JSON file that on_device wrote")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("torch.json"), help="the JSON file to write")
    arguments = parser.parse_args(options)
    report = json.loads(arguments.report.read_text())
    torch = find_torch()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "problems": []}
    measured: dict[tuple[int, ...], dict[str, Any]] = {}  # dense attention does not depend on the blocks
    for problem in report["problems"]:
        shape = tuple(problem[name] for name in ("batch", "heads", "sequence", "head_dim"))
        if shape not in measured:
            measured[shape] = measure(torch, *shape)
        sizes = {name: problem[name] for name in ("head_dim", "block_size", "top_k", "sequence")}
        results["problems"].append(sizes | measured[shape])
        arguments.out.write_text(json.dumps(results, indent=1))
    text = table(results, report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text, end="")


def find_torch() -> Any:
    """The torch module. Exits with the reason if PyTorch is missing or has no GPU."""
    try:
        import torch
    except ImportError:
        sys.exit("error: PyTorch is not installed in this environment")
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device (no GPU, or a CPU-only build)")
    return torch


def measure(torch: Any, batch: int, heads: int, sequence: int, head_dim: int) -> dict[str, Any]:
    """Times (seconds) and peak memory (bytes) of forward, and of forward with backward; messages of failures."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    shape = batch, heads, sequence, head_dim
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    results: dict[str, Any] = {"seconds": {}, "memory": {}, "failures": {}}

    def attend() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def keep(name: str, call: Callable[[], Any]) -> None:
        try:
            torch.cuda.reset_peak_memory_stats()
            results["seconds"][name] = measure_seconds(torch, call)
            results["memory"][name] = torch.cuda.max_memory_allocated()
        except RuntimeError as error:  # keep the other measurements
            results["failures"][name] = str(error)[:300]

    keep("forward", attend)
    for array in (query, key, value):
        array.requires_grad_()
    d_output = torch.randn_like(query)
    keep("forward_backward", lambda: torch.autograd.grad(attend(), (query, key, value), d_output))
    return results


def measure_seconds(torch: Any, call: Callable[[], Any]) -> dict[str, float]:
    """Median, minimum and maximum time of a call between two CUDA events (seconds), after a warm-up call."""
    call()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def table(results: dict[str, Any], report: dict[str, Any]) -> str:
    """Both results in Markdown; "-" where nothing was measured."""
    lines = [
        f"# PyTorch {results['torch']} on one {results['device']} beside JAX {report['machine']['jax']} on one "
        f"{report['machine']['device']}, {report['machine']['date']}",
        "",
        "Times in milliseconds, medians; spread is (maximum - minimum) / median. PyTorch: dense flash attention. Ours: "
        f"{report['backend']} kernels, routing included. Gain: PyTorch's time over ours.",
        "",
        "| head_dim | block / top_k | tokens | pass | PyTorch | spread | ours | spread | gain |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def cells(times: dict[str, float] | None) -> list[str]:
        if times is None:
            return ["-", "-"]
        spread = (times["most"] - times["least"]) / times["median"]
        return [f"{1e3 * times['median']:.2f}", f"{100 * spread:.0f} %"]

    for theirs, ours in zip(results["problems"], report["problems"], strict=True):
        for name in _CALLS:
            dense, sparse = theirs["seconds"].get(name), ours["seconds"].get(f"whole_{name}")
            gain = f"{dense['median'] / sparse['median']:.2f}" if dense and sparse else "-"
            sizes = str(ours["head_dim"]), f"{ours['block_size']} / {ours['top_k']}", str(ours["sequence"])
            lines.append(f"| {' | '.join([*sizes, name, *cells(dense), *cells(sparse), gain])} |")
    return "\n".join(lines) + "\n"
