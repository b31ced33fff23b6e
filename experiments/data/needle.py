"""Needle in a haystack: pairs of key and value hidden at random depths, some of them asked for at the very end."""

import numpy as np

from experiments.config import DataConfig
from experiments.data.source import ALL, Batch, Split, generator


class NeedleData:
    """Sequences such as `. . k3 v8 . . . . k7 v1 . . k3 .`, with target v8 at the last k3, and the depth of its pair.

    num_pairs pairs stand at random even places; num_queries of their keys follow at the end, each in a slot of two
    tokens, the key first. Token ids and the slots of two tokens are those of recall, so that a model trained there can
    be asked here, at any sequence_length. Source of the task: RULER (arXiv 2404.06654), single and multi-key needles.

    Args:
      config: sizes.
      seed: decides the training batches.

    Raises:
      ValueError: pairs and questions do not fit.
    """

    bytes_per_token: float | None = None

    def __init__(self, config: DataConfig, seed: int):
        self.num_slots = config.sequence_length // 2 - config.num_queries
        most = min(config.num_keys, self.num_slots)
        if not config.num_queries <= config.num_pairs <= most:
            raise ValueError(
                f"num_pairs must lie between num_queries={config.num_queries} and {most} for sequence_length="
                f"{config.sequence_length} and num_keys={config.num_keys}, got num_pairs={config.num_pairs}"
            )
        self.config, self.seed = config, seed
        self.vocab_size = config.num_keys + config.num_values + config.num_fillers
        self.description = {
            "task": "needle",
            "num_pairs": config.num_pairs,
            "num_queries": config.num_queries,
            "vocab_size": self.vocab_size,
        }

    def batch(self, step: int, split: Split, rows: np.ndarray | slice = ALL) -> Batch:
        config, rng = self.config, generator(self.seed, split, step)
        num_rows, pairs, queries = config.batch_size, config.num_pairs, config.num_queries
        first_value, first_filler = config.num_keys, config.num_keys + config.num_values
        tokens = rng.integers(first_filler, self.vocab_size, (num_rows, config.sequence_length), dtype=np.int32)
        targets = np.full_like(tokens, -1)
        depth = np.full(tokens.shape, -1, np.float32)

        def distinct(choices: int) -> np.ndarray:
            """`pairs` different numbers below choices in each row [rows, pairs]."""
            return rng.permuted(np.tile(np.arange(choices, dtype=np.int32), (num_rows, 1)), axis=1)[:, :pairs]

        key, slot = distinct(config.num_keys), distinct(self.num_slots)
        value = rng.integers(first_value, first_filler, (num_rows, pairs), dtype=np.int32)
        np.put_along_axis(tokens, 2 * slot, key, 1)
        np.put_along_axis(tokens, 2 * slot + 1, value, 1)
        last = slice(config.sequence_length - 2 * queries, None, 2)
        tokens[:, last], targets[:, last] = key[:, :queries], value[:, :queries]
        depth[:, last] = slot[:, :queries] / max(self.num_slots - 1, 1)
        return {"tokens": tokens[rows], "targets": targets[rows], "depth": depth[rows]}
