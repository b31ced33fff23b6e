"""Every finding within minutes, on two CPU cores.

Finding:  the SNR formula; block size 8 -> 2 and key convolution on recall; length; a short language model; speed.
Command:  make reproduce   (or python -m experiments reproduce --preset tiny)
Hardware: two CPU cores, 8 GB; 11 minutes.
Expected: recall accuracy 0.30, 0.87, 0.99 for B=8, 4, 2; dense 1.00; 0.78 for B=2 without key convolution.
"""

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.preset import ComparisonConfig, EfficiencyConfig, Preset, SnrConfig
from sparse_attn.nn import TransformerConfig


def preset() -> Preset:
    """Four layers of 64 features: budgets of 16 attended tokens of 64 for recall, of 64 of 512 for text."""
    recall = RunConfig(
        model=TransformerConfig(
            vocab_size=48,
            num_layers=4,
            hidden_size=64,
            mlp_size=64,
            num_heads=1,
            head_dim=64,
            window_size=4,
            block_size=2,
            top_k=8,
            key_conv_width=3,
        ),
        data=DataConfig(sequence_length=64, num_keys=16, num_values=16, num_fillers=16, num_pairs=16, batch_size=48),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        train=TrainConfig(steps=220, log_every=20, checkpoint_every=1000, tensorboard=False),
    )
    language_model = RunConfig(
        model=TransformerConfig(
            vocab_size=257,
            num_layers=4,
            hidden_size=64,
            mlp_size=128,
            num_heads=2,
            head_dim=32,
            window_size=16,
        ),
        data=DataConfig(task="text", sequence_length=512, batch_size=4, max_bytes=4_000_000),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=150, log_every=25, checkpoint_every=1000, evaluate_batches=32, tensorboard=False),
    )
    return Preset(
        name="tiny",
        recall=recall,
        recall_seeds=(0, 1, 2),
        block_sizes=((8, 2), (4, 4), (2, 8)),
        key_conv_block=(2, 8),
        key_conv_widths=(0, 3, 5),
        lengths=(64, 128, 256, 512),
        language_model=language_model,
        language_model_seeds=(0, 1),
        language_model_blocks=((32, 2), (8, 8)),
        snr=SnrConfig(),
        efficiency=EfficiencyConfig(sequence_lengths=(2048, 4096, 8192), longest_dense_backward=4096, repeats=3),
        comparison=ComparisonConfig(),
        processes=2,
    )
