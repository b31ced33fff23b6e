"""Every finding within minutes, on two CPU cores.

Finding:  SNR formula, block size 16 -> 4 at equal budget, key convolution, length, a short language model, speed.
Command:  make reproduce   (or python -m experiments reproduce --preset tiny)
Hardware: two CPU cores, 4 GB.
"""

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.configs import Preset
from experiments.studies.efficiency import EfficiencyConfig
from experiments.studies.snr import SnrConfig
from sparse_attn.nn import TransformerConfig


def preset() -> Preset:
    """Four layers of 64 features, budgets of 32 attended tokens of 128."""
    recall = RunConfig(
        model=TransformerConfig(
            vocab_size=72,
            num_layers=4,
            hidden_size=64,
            mlp_size=64,
            num_heads=1,
            head_dim=64,
            window_size=4,
            block_size=4,
            top_k=8,
            key_conv_width=3,
        ),
        data=DataConfig(sequence_length=128, num_keys=24, num_values=24, num_fillers=24, num_pairs=24, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        train=TrainConfig(steps=220, log_every=20, checkpoint_every=1000, tensorboard=False),
    )
    language_model = RunConfig(
        model=TransformerConfig(
            vocab_size=257,
            num_layers=4,
            hidden_size=96,
            mlp_size=192,
            num_heads=2,
            head_dim=48,
            window_size=16,
        ),
        data=DataConfig(task="text", sequence_length=512, batch_size=8, max_bytes=4_000_000),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=150, log_every=25, checkpoint_every=1000, evaluate_batches=16, tensorboard=False),
    )
    return Preset(
        name="tiny",
        description="two CPU cores, about ten minutes",
        recall=recall,
        recall_seeds=(0, 1, 2),
        block_sizes=((16, 2), (4, 8)),
        key_conv_block=(4, 8),
        key_conv_widths=(0, 3, 5),
        lengths=(128, 256, 512),
        language_model=language_model,
        language_model_seeds=(0, 1),
        language_model_blocks=((64, 2), (16, 8)),
        snr=SnrConfig(),
        efficiency=EfficiencyConfig(repeats=3, sequence_lengths=(2048, 4096, 8192)),
    )
