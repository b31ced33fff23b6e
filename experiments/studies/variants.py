"""Training the variants of a study over seeds, and the file in which a study keeps its numbers."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.config import RunConfig
from experiments.metrics import write_json
from experiments.stop import Stopped, stop_on_signal
from experiments.train import about, train
from sparse_attn.nn import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that differs from the study's base run in its attention alone."""

    name: str
    """Part of the run directory's name."""
    label: str
    """Name in plots and tables."""
    model: TransformerConfig

    def describe(self) -> dict[str, Any]:
        """What a report needs to know of it."""
        kind = "moba" if "moba" in self.model.layer_pattern else "dense"
        return {
            "name": self.name,
            "label": self.label,
            "kind": kind,
            "block_size": self.model.block_size if kind == "moba" else None,
            "top_k": self.model.top_k if kind == "moba" else None,
            "key_conv_width": self.model.key_conv_width,
        }


def dense(model: TransformerConfig) -> Variant:
    """The model with full attention in the place of MoBA, key convolution included."""
    pattern = tuple("dense" if kind == "moba" else kind for kind in model.layer_pattern)
    width = model.key_conv_width
    return Variant(f"dense-conv{width}", "dense", dataclasses.replace(model, layer_pattern=pattern))


def moba(model: TransformerConfig, block_size: int, top_k: int, key_conv_width: int | None = None) -> Variant:
    """The model with other blocks, and another width of the key convolution if one is given."""
    width = model.key_conv_width if key_conv_width is None else key_conv_width
    model = dataclasses.replace(model, block_size=block_size, top_k=top_k, key_conv_width=width)
    convolution = f", conv {width}" if width else ", no conv"
    return Variant(f"block{block_size}-top{top_k}-conv{width}", f"B={block_size}, k={top_k}{convolution}", model)


def train_variants(
    base: RunConfig,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    group: str,
    metric: str,
    processes: int,
) -> list[dict[str, Any]]:
    """Trains every variant with every seed, as far as that has not been done.

    Args:
      base: data, optimizer and length of the runs.
      variants: the models.
      seeds: seeds of parameters and training data.
      out: directory of the preset; run NAME of seed S goes to out/group/NAME-seedS, where other studies find it too.
      group: "recall" or "language_model".
      metric: which number of the evaluation counts.
      processes: runs that train side by side, as in `Preset`.

    Returns:
      For each variant its description, and "seeds", "values" (of the metric), "runs" (directories relative to out) and
      "num_parameters".
    """
    runs = []  # seed by seed: a study that was stopped has something of every variant
    for seed in seeds:
        for variant in variants:
            name = f"{variant.name}-seed{seed}"
            runs.append((dataclasses.replace(base, name=name, seed=seed, model=variant.model), out / group / name))
    if processes > 1:
        _train_side_by_side(runs, processes, group)
    done = [train(*run) for run in tqdm(runs, desc=group, unit="run", disable=processes > 1)]
    results = {variant.name: done[i :: len(variants)] for i, variant in enumerate(variants)}
    return [
        {
            **variant.describe(),
            "seeds": list(seeds),
            "values": [result["evaluation"][metric] for result in results[variant.name]],
            "runs": [f"{group}/{variant.name}-seed{seed}" for seed in seeds],
            "num_parameters": results[variant.name][0]["num_parameters"],
        }
        for variant in variants
    ]


def _train_side_by_side(runs: Sequence[tuple[RunConfig, Path]], processes: int, group: str) -> None:
    """Trains what is not done yet in several processes, each on its share of the cores.

    Small models gain little from a second core, so two of them side by side take half the time. Ctrl-C reaches every
    process by itself, SIGTERM is passed on, and each process saves its run. A run that fails is left for the caller to
    meet.

    Raises:
      Stopped: Ctrl-C or SIGTERM, once every process has ended.
    """
    waiting = [run for run in runs if not _is_done(run)]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_train_share, args=(waiting[i::processes], cores))
        for i, cores in enumerate(share_cores(processes)[: len(waiting)])
    ]
    for worker in workers:
        worker.start()
    with stop_on_signal() as stopped, tqdm(total=len(waiting), desc=group, unit="run") as bar:
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.5)
            bar.update(sum(map(_is_done, waiting)) - bar.n)
            if stopped() == signal.SIGTERM:
                for worker in workers:
                    worker.terminate()
                break
        for worker in workers:
            worker.join()
        if (number := stopped()) is not None:
            raise Stopped(f"Stopped {group}; its runs go on from their checkpoints.", number)


def _is_done(run: tuple[RunConfig, Path]) -> bool:
    return (run[1] / "result.json").exists()


def share_cores(processes: int) -> list[list[int]]:
    """The processor cores at hand, dealt out; none to anyone where the system has no way to keep to them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[i::processes] for i in range(processes)]


def keep_to(cores: Sequence[int]) -> None:
    """Keeps this process to the cores, if any are given."""
    if cores:
        os.sched_setaffinity(0, cores)


def _train_share(runs: Sequence[tuple[RunConfig, Path]], cores: Sequence[int]) -> None:
    keep_to(cores)
    with contextlib.suppress(KeyboardInterrupt):
        for run in runs:
            train(*run)


def write_study(
    out: Path, study: str, preset: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measures and writes out/study/study.json, or returns the one that is there if it was made with the same settings.

    Args:
      out: directory of the preset.
      study: name of the study.
      preset: name of the preset.
      settings: all that decides the numbers.
      measure: does the work and returns the numbers.
    """
    path = out / study / "study.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        there = json.loads(path.read_text())
        if there["settings"] == settings:
            return there
    start = time.monotonic()
    numbers = measure()
    seconds = time.monotonic() - start
    content = {"study": study, "preset": preset, "settings": settings, "about": about(), "seconds": seconds, **numbers}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return content
