"""What a training step computes, by arithmetic, which part of the devices' peak that is, and how full they are."""

import jax
import numpy as np

from sparse_attn.nn import TransformerConfig

# Operations per second of one device in bfloat16 without sparsity, by `jax.Device.device_kind`. Sources: the page of
# each version at cloud.google.com/tpu/docs; NVIDIA's data sheets of A100, H100 (SXM) and H200.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def train_flops(config: TransformerConfig, sequence_length: int) -> float:
    """Floating-point operations of a training step for each token, as the model needs them: nothing is recomputed.

    3 (2 P + sum over layers of 2 H D (2 A + R)): the backward pass costs twice the forward pass. P counts the
    parameters of the projections, the MLPs and the head. H query heads have D channels. A token attends to A keys and
    its router scores R block means, on average over one document of N tokens, t = 0 ... N - 1:

      dense: A is the mean of t + 1; sliding_window: that of min(t + 1, window_size); R = 0.
      moba, with n = t // block_size past blocks: A is the mean of t % block_size + 1 + block_size min(n, top_k - 1), R
      that of n.

    Args:
      config: the model.
      sequence_length: N (tokens).
    """
    heads, kv_heads = config.num_heads, config.num_key_value_heads or config.num_heads
    projections = 2 * config.hidden_size * config.head_dim * (heads + kv_heads)
    layer = projections + 3 * config.hidden_size * config.mlp_size
    parameters = config.num_layers * layer + config.hidden_size * config.vocab_size
    place = np.arange(sequence_length)
    past, inside = np.divmod(place, config.block_size)
    products = {  # of a query, with keys, values and block means
        "dense": 2 * (place + 1),
        "sliding_window": 2 * np.minimum(place + 1, config.window_size),
        "moba": 2 * (inside + 1 + config.block_size * np.minimum(past, config.top_k - 1)) + past,
    }
    attention = sum(products[kind].mean() for kind in config.layer_kinds)
    return 3 * (2 * parameters + 2 * heads * config.head_dim * float(attention))


def device_metrics(flops_per_second: float, num_devices: int) -> dict[str, float]:
    """What this process can say of its devices.

    Args:
      flops_per_second: `train_flops` times tokens per second.
      num_devices: devices that share this work, all of one kind.

    Returns:
      model_flops_utilization: part of the devices' peak in `PEAKS`, where their kind is known.
      peak_memory_bytes: most that any device of this process has held, where they count it.
    """
    devices = jax.local_devices()
    peak = PEAKS.get(devices[0].device_kind)
    held = [
        stats["peak_bytes_in_use"] for each in devices if "peak_bytes_in_use" in (stats := each.memory_stats() or {})
    ]
    values = {}
    if peak is not None:
        values["model_flops_utilization"] = flops_per_second / (peak * num_devices)
    if held:
        values["peak_memory_bytes"] = float(max(held))
    return values
