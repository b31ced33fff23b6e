"""Loss, accuracy, bits per byte, accuracy by the depth of a needle, and needles that the model writes itself."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.config import DataConfig
from experiments.data.source import Batch, Data
from sparse_attn.nn import Transformer

DEPTH_BINS = 10


def evaluate(model: Transformer, data: Data, num_batches: int, by_generation: bool = False) -> dict[str, Any]:
    """Evaluates a model on validation batches, at the sequence length of the data, whatever it was trained at.

    Args:
      model: the model.
      data: where the batches come from.
      num_batches: how many.
      by_generation: whether to let the model write the answers too; for needle alone.

    Returns:
      loss: mean cross-entropy of the targets (nats).
      accuracy: part of the targets whose token has the largest logit.
      num_targets: how many there were.
      bits_per_byte (text): loss / ln 2 / bytes_per_token.
      accuracy_by_depth (needle): accuracy of the answers that stand in each tenth of the sequence, None where no
        answer does.
      generated_accuracy (by_generation): part of the answers that the model writes right, behind prompts that end with
        the questions, with a cache.
      generated_agreement (by_generation): part of the answers that are right, or wrong, by logits and writing alike.

    Raises:
      ValueError: by_generation of another task.
    """
    losses: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    written: list[np.ndarray] = []
    for step in tqdm(range(num_batches), desc="evaluate", leave=False, disable=None):
        batch = data.batch(step, "validation")
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        scores = _score(model, arrays["tokens"], arrays["targets"], arrays.get("segment_ids"))
        asked = batch["targets"] >= 0
        for kept, score in zip((losses, hits), scores, strict=True):
            kept.append(np.asarray(score)[asked])
        if "depth" in batch:
            depths.append(batch["depth"][asked])
        if by_generation:
            written.append(_write_needles(model, batch))
    loss, hit = np.concatenate(losses).astype(np.float64), np.concatenate(hits)
    result: dict[str, Any] = {"loss": float(loss.mean()), "accuracy": float(hit.mean()), "num_targets": int(hit.size)}
    if data.bytes_per_token is not None:
        result["bits_per_byte"] = result["loss"] / math.log(2) / data.bytes_per_token
    if depths:
        place = np.minimum(np.concatenate(depths) * DEPTH_BINS, DEPTH_BINS - 1).astype(int)
        chosen = [hit[place == i] for i in range(DEPTH_BINS)]
        result["accuracy_by_depth"] = [float(each.mean()) if each.size else None for each in chosen]
    if written:
        write = np.concatenate(written)
        result["generated_accuracy"] = float(write.mean())
        result["generated_agreement"] = float((write == hit).mean())
    return result


def _write_needles(model: Transformer, batch: Batch) -> np.ndarray:
    """Whether the model writes the answer of each target right, bool [targets]."""
    if "depth" not in batch:
        raise ValueError("by_generation must be off for all tasks but needle, whose questions end a sequence")
    row, place = np.nonzero(batch["targets"] >= 0)
    chunk = min(512, batch["tokens"].shape[1])
    found = model.generate(batch["tokens"][row], lengths=place + 1, max_new_tokens=1, prefill_chunk=chunk)
    return found.tokens[:, 0] == batch["targets"][row, place]


@nnx.jit
def _score(
    model: Transformer, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy (nats) and whether the target has the largest logit, both [batch, sequence]."""
    logits = model(tokens, segment_ids)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return loss, logits.argmax(-1) == targets


def at_length(data: DataConfig, sequence_length: int) -> DataConfig:
    """The same data at another sequence length, with as many tokens in a batch (at least one sequence)."""
    batch_size = max(1, data.batch_size * data.sequence_length // sequence_length)
    return dataclasses.replace(data, sequence_length=sequence_length, batch_size=min(batch_size, data.batch_size))
