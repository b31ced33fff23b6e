"""Multi-query associative recall: pairs of key and value in the first half, the keys alone in the second half."""

import numpy as np

from experiments.config import DataConfig
from experiments.data.source import ALL, Batch, Split, generator


class RecallData:
    """Sequences such as `k3 v8 . . k7 v1 | . . k7 . k3 .`, with targets v1 after the second k7 and v8 after k3.

    Keys of a sequence differ; values may repeat; pairs and questions stand at random even places, in random order;
    everything else is filler. Training draws the number of pairs from 2 ... num_pairs; validation has num_pairs.
    Token ids: keys, then values, then fillers. Source of the task: Zoology (arXiv 2312.04927).

    Args:
      config: sizes.
      seed: decides the training batches.

    Raises:
      ValueError: the pairs do not fit.
    """

    bytes_per_token: float | None = None

    def __init__(self, config: DataConfig, seed: int):
        self.num_slots = (
            config.sequence_length // 4
        )  # places for a pair in the first half, for a question in the second
        most = min(config.num_keys, self.num_slots)
        if not 2 <= config.num_pairs <= most:
            raise ValueError(
                f"num_pairs must lie between 2 and {most} for sequence_length={config.sequence_length} and "
                f"num_keys={config.num_keys}, got num_pairs={config.num_pairs}"
            )
        self.config, self.seed = config, seed
        self.vocab_size = config.num_keys + config.num_values + config.num_fillers
        self.description = {"task": "recall", "num_pairs": config.num_pairs, "vocab_size": self.vocab_size}

    def batch(self, step: int, split: Split, rows: np.ndarray | slice = ALL) -> Batch:
        config, rng = self.config, generator(self.seed, split, step)
        num_rows, pairs, slots = config.batch_size, config.num_pairs, self.num_slots
        first_value, first_filler = config.num_keys, config.num_keys + config.num_values
        tokens = rng.integers(first_filler, self.vocab_size, (num_rows, config.sequence_length), dtype=np.int32)
        targets = np.full_like(tokens, -1)
        keys = rng.permuted(np.tile(np.arange(config.num_keys, dtype=np.int32), (num_rows, 1)), axis=1)[:, :pairs]
        values = rng.integers(first_value, first_filler, (num_rows, pairs), dtype=np.int32)
        count = rng.integers(2, pairs + 1, (num_rows, 1)) if split == "train" else np.full((num_rows, 1), pairs)

        def scatter() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Which slots hold a pair [rows, slots], and the key and value there."""
            pair = rng.permuted(np.tile(np.arange(slots), (num_rows, 1)), axis=1)
            index = np.minimum(pair, pairs - 1)
            return pair < count, np.take_along_axis(keys, index, 1), np.take_along_axis(values, index, 1)

        is_pair, key, value = scatter()
        key_place, value_place = tokens[:, 0 : 2 * slots : 2], tokens[:, 1 : 2 * slots : 2]  # views into tokens
        key_place[is_pair], value_place[is_pair] = key[is_pair], value[is_pair]
        is_question, key, value = scatter()
        tokens[:, 2 * slots : 4 * slots : 2][is_question] = key[is_question]
        targets[:, 2 * slots : 4 * slots : 2][is_question] = value[is_question]
        return {"tokens": tokens[rows], "targets": targets[rows]}
