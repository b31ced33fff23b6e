"""What a run says while it trains: a line in the terminal, a progress bar, metrics.jsonl and TensorBoard."""

import json
import os
import re
import time
from pathlib import Path

from tqdm import tqdm


class Metrics:
    """Writes a run's records, one for a logged step, steps ascending and each once.

    Args:
      run_dir: directory of the run; metrics.jsonl and tensorboard/ are written there.
      name: name of the run, shown beside the bar.
      first_step: steps done before, 0 for a new run; records of later steps, left by a killed run, are removed.
      num_steps: steps of the whole run.
      tensorboard: whether to write for TensorBoard.

    Raises:
      ValueError: metrics.jsonl is damaged before its last line.
      ImportError: tensorboardX, of the extra "experiments", is missing and asked for.
    """

    def __init__(self, run_dir: Path, name: str, first_step: int, num_steps: int, tensorboard: bool):
        path = run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(run_dir) if record["step"] <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # not needed without TensorBoard

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._file = path.open("a", buffering=1)  # a line at a time, for those who watch
        # On a terminal alone: a bar in a log file is noise, and the lines below say the same.
        self._bar = tqdm(total=num_steps, initial=first_step, desc=name, unit="step", disable=None, dynamic_ncols=True)
        self._name, self._first_step, self._num_steps, self._start = name, first_step, num_steps, time.monotonic()

    def advance(self) -> None:
        """One more step was started."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values that belong to the parameters after `step` steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        rate = (step - self._first_step) / max(time.monotonic() - self._start, 1e-9)
        remaining = (self._num_steps - step) / max(rate, 1e-9)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        tqdm.write(
            f"{self._name}  step {step}/{self._num_steps}  {shown}  {rate:.2f} steps/s  "
            f"{tqdm.format_interval(remaining)} left"
        )

    def flush(self) -> None:
        """Puts every record on the disk, as must happen before a checkpoint that makes them final."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files and the bar."""
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._bar.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl, none if there is no such file; a half-written last line is left out.

    Raises:
      ValueError: another line is damaged.
    """
    path = run_dir / "metrics.jsonl"
    records = []
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} must be a record with a step, got {line!r}") from error
        records.append(record)
    return records


def check_local(path: Path, option: str) -> None:
    """Raises ValueError, naming the option, if a path is an address such as gs://bucket/run.

    Runs append to files, rename directories and map files into memory, which stores of objects do not offer. pathlib
    would make a directory "gs:" of such an address, and turns // into /.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # two letters at least: C:/ is a disk
        raise ValueError(f"{option} must be a path of this machine (a mounted store is one), got {option}={path}")


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file that is either whole or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)
