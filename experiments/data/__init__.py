"""The data of every task."""

from pathlib import Path

from experiments.config import DataConfig
from experiments.data import huggingface
from experiments.data.needle import NeedleData
from experiments.data.recall import RecallData
from experiments.data.source import Data
from experiments.data.text import python_source


def make_data(config: DataConfig, seed: int, run_dir: Path | None = None) -> Data:
    """The data that a configuration names.

    Args:
      config: which task, and its sizes.
      seed: decides the training batches.
      run_dir: where "huggingface" keeps its tokenizer and tokens; the other tasks write nothing.

    Raises:
      ValueError: the configuration cannot be met.
    """
    if config.task == "recall":
        return RecallData(config, seed)
    if config.task == "needle":
        return NeedleData(config, seed)
    if config.task == "text":
        return python_source(config, seed)
    if run_dir is None:
        raise ValueError("run_dir must be given for data.task='huggingface', got run_dir=None")
    return huggingface.load(config, seed, run_dir)
