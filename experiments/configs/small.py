"""The same findings with more tokens, layers and heads.

Finding:  as tiny, at budgets of 128 attended tokens of 1024, with a middle block size.
Command:  python -m experiments reproduce --preset small
Hardware: one GPU, about an hour by estimate; it has been built and lowered, not yet run to the end.
"""

import dataclasses

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.preset import ComparisonConfig, EfficiencyConfig, Preset, SnrConfig
from sparse_attn.nn import TransformerConfig


def preset() -> Preset:
    """Four layers of 256 features for recall, eight of 384 for text."""
    recall = RunConfig(
        model=TransformerConfig(
            vocab_size=384,
            num_layers=4,
            hidden_size=256,
            mlp_size=512,
            num_heads=4,
            head_dim=64,
            window_size=8,
            block_size=16,
            top_k=8,
            key_conv_width=3,
        ),
        data=DataConfig(
            sequence_length=1024, num_keys=128, num_values=128, num_fillers=128, num_pairs=96, batch_size=32
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(steps=2000, log_every=50, checkpoint_every=500),
    )
    language_model = RunConfig(
        model=TransformerConfig(
            vocab_size=257,
            num_layers=8,
            hidden_size=384,
            mlp_size=1024,
            num_heads=6,
            head_dim=64,
            window_size=64,
            dtype="bfloat16",
        ),
        data=DataConfig(task="text", sequence_length=4096, batch_size=8, max_bytes=50_000_000),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(steps=2000, log_every=50, checkpoint_every=500, evaluate_batches=32),
    )
    return Preset(
        name="small",
        recall=recall,
        recall_seeds=(0, 1, 2),
        block_sizes=((64, 2), (32, 4), (16, 8)),
        key_conv_block=(16, 8),
        key_conv_widths=(0, 3, 5),
        lengths=(1024, 2048, 4096, 8192),
        language_model=language_model,
        language_model_seeds=(0, 1, 2),
        language_model_blocks=((256, 2), (64, 8)),
        snr=dataclasses.replace(SnrConfig(), trials=8192),
        comparison=ComparisonConfig(sequence_length=2048, block_size=64),
        efficiency=EfficiencyConfig(num_heads=8, sequence_lengths=(2048, 8192, 32768, 131072), torch=False),
    )
