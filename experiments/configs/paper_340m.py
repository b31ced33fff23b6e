"""The 340M hybrid of FlashMoBA (arXiv 2511.11571), to be built, lowered and trained by those who have the machines.

Finding:  B=512 to 128 at 7/8 sparsity: WikiText perplexity 20.9 to 19.7, RULER 38.8 to 56.0 %; kconv3 RULER 63.9 %.
Command:  python -m experiments study language_model --preset paper-340m   (needs a network and the extra [huggingface])
Hardware: a pod; 100B tokens. It has been built and lowered here, never trained.

Widths, heads, MLP, head_dim, blocks and context are the paper's. Known from reports alone, and so to be checked: 24
layers, window 256, 100B tokens of FineWeb-Edu. Ours: vocabulary, batch, learning rate, tied embeddings (341M
parameters; 374M untied).
"""

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.preset import ComparisonConfig, EfficiencyConfig, Preset, SnrConfig
from sparse_attn.nn import TransformerConfig

CONTEXT = 8192  # tokens
TOKENS = 100_000_000_000
BATCH = 64  # sequences

MODEL = TransformerConfig(tie_embeddings=True, dtype="bfloat16", remat=True, scan_layers=True)


def preset(name: str = "paper-340m", model: TransformerConfig = MODEL, learning_rate: float = 1e-3) -> Preset:
    """All studies with the paper's model; another model of the paper differs in sizes and learning rate alone."""
    train = TrainConfig(steps=TOKENS // (BATCH * CONTEXT), log_every=100, checkpoint_every=1000, evaluate_batches=64)
    optimizer = OptimizerConfig(learning_rate, warmup_steps=1000, final_fraction=0.1, weight_decay=0.1, beta2=0.95)
    text = DataConfig(task="huggingface", sequence_length=CONTEXT, batch_size=BATCH, max_bytes=500_000_000_000)
    recall = DataConfig(
        sequence_length=CONTEXT, batch_size=BATCH, num_keys=8000, num_values=8000, num_fillers=8000, num_pairs=512
    )
    return Preset(
        name=name,
        recall=RunConfig(model=model, data=recall, optimizer=optimizer, train=train),
        recall_seeds=(0,),
        block_sizes=((512, 2), (256, 4), (128, 8)),
        key_conv_block=(128, 8),
        key_conv_widths=(0, 3, 5),
        lengths=(8192, 16384, 32768, 65536),
        language_model=RunConfig(model=model, data=text, optimizer=optimizer, train=train),
        language_model_seeds=(0,),
        language_model_blocks=((512, 2), (128, 8)),
        snr=SnrConfig(block_sizes=(128, 256, 512), block_size=128),
        comparison=ComparisonConfig(sequence_length=8192, block_size=128),
        efficiency=EfficiencyConfig(
            sequence_lengths=(8192, 65536, 524288),
            batch_size=2,
            num_heads=16,
            head_dim=128,
            block_size=128,
            dtype="bfloat16",
            torch=False,
        ),
    )
