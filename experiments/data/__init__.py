"""Batches as pure functions of (seed, split, step), so that a resumed run sees what an uninterrupted one sees."""

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from experiments.config import DataConfig

Split = Literal["train", "validation"]
Batch = dict[str, np.ndarray]


class Data(Protocol):
    """A source of batches.

    Attributes:
      vocab_size: one more than the largest token id.
      bytes_per_token: bytes of text for each target of the validation split; None where tokens are not text.
      description: what the data are, for the run's files: sizes and a hash.
    """

    vocab_size: int
    bytes_per_token: float | None
    description: dict[str, Any]

    def batch(self, step: int, split: Split) -> Batch:
        """The batch of a step.

        Args:
          step: from 0.
          split: "train", which depends on the seed, or "validation", which does not.

        Returns:
          tokens: int32 [batch, sequence].
          targets: int32 [batch, sequence], the token to predict at each place, -1 where nothing is asked.
          segment_ids (text): int32 [batch, sequence], the document of each token.
          depth (needle): float32 [batch, sequence], where in the sequence the answer to a target is: 0 start, 1 end.
        """
        ...


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
        from experiments.data.recall import RecallData

        return RecallData(config, seed)
    if config.task == "needle":
        from experiments.data.needle import NeedleData

        return NeedleData(config, seed)
    if config.task == "text":
        from experiments.data.text import python_source

        return python_source(config, seed)
    from experiments.data.huggingface import load

    if run_dir is None:
        raise ValueError("run_dir must be given for data.task='huggingface', got run_dir=None")
    return load(config, seed, run_dir)


def generator(seed: int, split: Split, step: int) -> np.random.Generator:
    """The random numbers of one step; validation does not depend on the seed."""
    return np.random.default_rng([0, 0, step] if split == "validation" else [1, seed, step])
