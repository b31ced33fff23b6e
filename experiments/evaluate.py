"""Loss, accuracy, bits per byte, and accuracy by the depth of a needle."""

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
from experiments.data.source import Data
from sparse_attn.nn import Transformer

DEPTH_BINS = 10


def evaluate(model: Transformer, data: Data, num_batches: int) -> dict[str, Any]:
    """Evaluates a model on validation batches, at the sequence length of the data, whatever it was trained at.

    Args:
      model: the model.
      data: where the batches come from.
      num_batches: how many.

    Returns:
      loss: mean cross-entropy of the targets (nats).
      accuracy: part of the targets whose token has the largest logit.
      num_targets: how many there were.
      bits_per_byte (text): loss / ln 2 / bytes_per_token.
      accuracy_by_depth (needle): accuracy of the answers that stand in each tenth of the sequence, None where no
        answer does.
    """
    losses: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    for step in tqdm(range(num_batches), desc="evaluate", leave=False, disable=None):
        batch = data.batch(step, "validation")
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        scores = _score(model, arrays["tokens"], arrays["targets"], arrays.get("segment_ids"))
        asked = batch["targets"] >= 0
        for kept, score in zip((losses, hits), scores, strict=True):
            kept.append(np.asarray(score)[asked])
        if "depth" in batch:
            depths.append(batch["depth"][asked])
    loss, hit = np.concatenate(losses).astype(np.float64), np.concatenate(hits)
    result: dict[str, Any] = {"loss": float(loss.mean()), "accuracy": float(hit.mean()), "num_targets": int(hit.size)}
    if data.bytes_per_token is not None:
        result["bits_per_byte"] = result["loss"] / math.log(2) / data.bytes_per_token
    if depths:
        place = np.minimum(np.concatenate(depths) * DEPTH_BINS, DEPTH_BINS - 1).astype(int)
        chosen = [hit[place == i] for i in range(DEPTH_BINS)]
        result["accuracy_by_depth"] = [float(each.mean()) if each.size else None for each in chosen]
    return result


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
