"""The commands of `python -m experiments`: a function's signature is the options, its docstring their help."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from experiments.config import DistributedConfig, RunConfig, Task
from experiments.configs import load_preset
from experiments.data import make_data
from experiments.evaluate import at_length, evaluate
from experiments.generate import stream_text
from experiments.kernels.roofline import roofline
from experiments.kernels.tpu_report import tpu_report
from experiments.mesh import join_processes
from experiments.metrics import check_local, write_json
from experiments.preset import DecodingConfig, EfficiencyConfig, Preset
from experiments.report import write_report
from experiments.studies import (
    block_size,
    comparison,
    decoding,
    efficiency,
    key_convolution,
    language_model,
    length,
    snr,
)
from experiments.train import about, load_run, train
from sparse_attn.nn import Sampling

StudyName = Literal["snr", "block_size", "key_convolution", "length", "language_model", "efficiency", "comparison"]

ALONE = DistributedConfig()

# The studies that train come before those that measure what was trained.
STUDIES: dict[StudyName, Callable[[Preset, Path], dict[str, Any]]] = {
    "efficiency": efficiency.run,
    "block_size": block_size.run,
    "key_convolution": key_convolution.run,
    "length": length.run,
    "snr": snr.run,
    "language_model": language_model.run,
    "comparison": comparison.run,
}

DECODING = DecodingConfig()


def train_command(
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
    run_dir: Path | None = None,
    resume: bool = True,
    distributed: DistributedConfig = ALONE,
) -> None:
    """Trains one model, or goes on with a run that was stopped.

    Args:
      config: the run.
      run_dir: directory of the run, the same for every process; None: runs/NAME.
      resume: whether to go on from a checkpoint that is there; if not, the directory must hold no run.
      distributed: how several processes find each other.
    """
    join_processes(distributed)
    train(config, run_dir or Path("runs") / config.name, resume)


def evaluate_command(
    run_dir: Path,
    task: Task | None = None,
    sequence_lengths: tuple[int, ...] = (),
    num_pairs: int | None = None,
    num_batches: int = 8,
    by_generation: bool = False,
) -> None:
    """Evaluates a trained model and prints one line of JSON for each sequence length.

    Args:
      run_dir: directory of the run.
      task: what to evaluate on; None: what it was trained on. recall and needle can stand in for each other (a task).
      sequence_lengths: lengths of the sequences; none: that of training (tokens).
      num_pairs: recall, needle: pairs in a sequence; None: as in training (pairs).
      num_batches: length of the evaluation; long sequences come in smaller batches (validation batches).
      by_generation: needle: whether to let the model write the answers too, from prompts that end with the questions.
    """
    config, model = load_run(run_dir)
    for sequence_length in sequence_lengths or (config.data.sequence_length,):
        data = at_length(config.data, sequence_length)
        data = dataclasses.replace(data, task=task or data.task, num_pairs=num_pairs or data.num_pairs)
        result = evaluate(model, make_data(data, config.seed, run_dir), num_batches, by_generation=by_generation)
        print(json.dumps({"task": data.task, "sequence_length": sequence_length, **result}))


def generate_command(
    run_dir: Path,
    prompt: str = "",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> None:
    """Prints what a trained model goes on with behind a prompt, as it comes.

    Args:
      run_dir: directory of the run.
      prompt: text, the start of a document; for recall and needle token ids with spaces between them.
      temperature: 0 takes the likeliest token, 1 draws from the model's probabilities (a divisor of the logits).
      top_k: likeliest tokens to draw from; None: all (tokens).
      top_p: least probability of the likeliest tokens to draw from (a fraction from 0 to 1).
      max_new_tokens: most tokens to generate; the end of the document comes first if the model says so (tokens).
      seed: of the random numbers (an integer).
      stop: what ends the answer too: characters, or words that are one token each.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for piece in stream_text(run_dir, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop):
        print(piece, end="", flush=True)
    print()


def study(name: tyro.conf.Positional[StudyName], preset: str = "tiny", out: Path | None = None) -> None:
    """Runs one study of a preset, as far as that has not been done.

    Args:
      name: the study.
      preset: scale of the study: tiny, small, paper-340m or paper-1b (a name).
      out: directory of the preset's results; None: runs/PRESET.
    """
    out = out or Path("runs") / preset
    check_local(out, "out")
    STUDIES[name](load_preset(preset), out)


def reproduce(preset: str = "tiny", out: Path | None = None) -> None:
    """Runs every study of a preset, then writes the report. Stopped and called again, it goes on where it was.

    Args:
      preset: scale of the studies: tiny, small, paper-340m or paper-1b (a name).
      out: directory of the results; None: runs/PRESET.
    """
    out = out or Path("runs") / preset
    for name in (bar := tqdm(STUDIES, desc="studies", unit="study")):
        bar.set_postfix_str(name)
        study(name, preset, out)
    page = write_report(out)
    print(f"\nThe report is in {page.resolve()}: open it in a browser, or read {page.with_suffix('.md').resolve()}.")


def report(out: Path = Path("runs/tiny")) -> None:
    """Writes the report of what the studies left in a directory.

    Args:
      out: directory of a preset's results, such as runs/tiny.
    """
    print(write_report(out).resolve())


def benchmark(
    config: Annotated[EfficiencyConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    decode: bool = False,
    decoding_config: Annotated[DecodingConfig, tyro.conf.arg(name="decoding")] = DECODING,
) -> None:
    """Prints time and memory of MoBA, routing included, beside dense attention's, and the machine they were taken on.

    Args:
      config: what is timed.
      out: JSON file to write the numbers to as well.
      decode: whether to time decoding with a cache instead: a step, the bytes that it reads, and prefill in chunks.
      decoding_config: what is timed with --decode.
    """
    if out is not None:
        check_local(out, "out")
    if decode:
        numbers = {"settings": dataclasses.asdict(decoding_config), **decoding.measure(decoding_config)}
    else:
        numbers = {"settings": dataclasses.asdict(config), **efficiency.measure(config)}
    numbers["about"] = about()
    print(decoding.table(numbers) if decode else efficiency.table(numbers))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, numbers)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "generate": generate_command,
    "study": study,
    "reproduce": reproduce,
    "report": report,
    "benchmark": benchmark,
    "roofline": roofline,
    "tpu_report": tpu_report,
}
