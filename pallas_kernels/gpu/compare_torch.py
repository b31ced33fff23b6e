"""PyTorch's flash attention on the problems of a report: `python -m pallas_kernels.gpu.compare_torch gpu.json`.

Run it after `on_device` on the same machine, where PyTorch is installed, with the JSON file that `on_device` wrote.
Dense causal attention by `torch.nn.functional.scaled_dot_product_attention`, flash backend, in bfloat16; times by CUDA
events. It writes a JSON file and, in Markdown, a table with the times of the report beside them. It has not been run on
a GPU yet. JAX is not imported: it would take the memory.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path, help="the JSON file of pallas_kernels.gpu.on_device")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("torch.json"), help="the JSON file to write")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    torch = find_torch()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "problems": []}
    measured: dict[tuple[int, ...], dict[str, Any]] = {}  # problems that differ in their blocks alone are one here
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
    """The module, where it can use a GPU; ends the program with the reason where it cannot."""
    try:
        import torch
    except ImportError:
        sys.exit("PyTorch is not installed in this environment; there is nothing to compare with")
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device (a build for CPUs, or no GPU); there is nothing to compare with")
    return torch


def measure(torch: Any, batch: int, heads: int, sequence: int, head_dim: int) -> dict[str, Any]:
    """Seconds and peak bytes of forward, and of forward with backward; a failure is kept as its text."""
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
        except RuntimeError as error:  # one call that fails must not lose the others
            results["failures"][name] = str(error)[:300]

    keep("forward", attend)
    for array in (query, key, value):
        array.requires_grad_()
    d_output = torch.randn_like(query)
    keep("forward_backward", lambda: torch.autograd.grad(attend(), (query, key, value), d_output))
    return results


def measure_seconds(torch: Any, call: Callable[[], Any]) -> dict[str, float]:
    """Median, least and most of the times of a call between two CUDA events, after one that does not count."""
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
    """Both results as a page of Markdown; "-" for what was not measured."""
    lines = [
        f"# PyTorch {results['torch']} on one {results['device']} beside JAX {report['machine']['jax']} on one "
        f"{report['machine']['device']}, {report['machine']['date']}",
        "",
        "Times in milliseconds, medians; spread is (most - least) / median. PyTorch: dense flash attention. Ours: "
        f"{report['backend']} kernels, routing included. Gain is PyTorch's time over ours.",
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


if __name__ == "__main__":
    main()
