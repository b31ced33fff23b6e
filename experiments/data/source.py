"""Batches as pure functions of (seed, split, step), so that a resumed run sees what an uninterrupted one sees."""

from typing import Any, Literal, Protocol

import numpy as np

Split = Literal["train", "validation"]
Batch = dict[str, np.ndarray]
ALL = slice(None)


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

    def batch(self, step: int, split: Split, rows: np.ndarray | slice = ALL) -> Batch:
        """The batch of a step, or some rows of it.

        Args:
          step: from 0.
          split: "train", which depends on the seed, or "validation", which does not.
          rows: which rows are wanted, as an index of them.

        Returns:
          tokens: int32 [batch, sequence].
          targets: int32 [batch, sequence], the token to predict at each place, -1 where nothing is asked.
          segment_ids (text): int32 [batch, sequence], the document of each token.
          depth (needle): float32 [batch, sequence], where in the sequence the answer to a target is: 0 start, 1 end.
        """
        ...


def generator(seed: int, split: Split, step: int) -> np.random.Generator:
    """The random numbers of one step; validation does not depend on the seed."""
    return np.random.default_rng([0, 0, step] if split == "validation" else [1, seed, step])
