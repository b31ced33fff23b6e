"""The studies, one file each, and the commands that run one of them or all."""

import importlib
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from experiments.metrics import check_local

StudyName = Literal["snr", "block_size", "key_convolution", "length", "language_model", "efficiency", "comparison"]

# The studies that train come before those that measure what was trained.
ORDER: tuple[StudyName, ...] = (
    "efficiency",
    "block_size",
    "key_convolution",
    "length",
    "snr",
    "language_model",
    "comparison",
)


def study(name: tyro.conf.Positional[StudyName], preset: str = "tiny", out: Path | None = None) -> None:
    """Runs one study of a preset, as far as that has not been done.

    Args:
      name: the study.
      preset: scale of the study: tiny, small, paper-340m or paper-1b (a name).
      out: directory of the preset's results; None: runs/PRESET.
    """
    from experiments.configs import load_preset

    out = out or Path("runs") / preset
    check_local(out, "out")
    module = importlib.import_module(f"experiments.studies.{name}")
    module.run(load_preset(preset), out)


def reproduce(preset: str = "tiny", out: Path | None = None) -> None:
    """Runs every study of a preset, then writes the report. Stopped and called again, it goes on where it was.

    Args:
      preset: scale of the studies: tiny, small, paper-340m or paper-1b (a name).
      out: directory of the results; None: runs/PRESET.
    """
    from experiments.report import write_report

    out = out or Path("runs") / preset
    for name in (bar := tqdm(ORDER, desc="studies", unit="study")):
        bar.set_postfix_str(name)
        study(name, preset, out)
    page = write_report(out)
    print(f"\nThe report is in {page.resolve()}: open it in a browser, or read {page.with_suffix('.md').resolve()}.")
