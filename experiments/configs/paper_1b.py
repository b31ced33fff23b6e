"""The 1B hybrid of FlashMoBA (arXiv 2511.11571): as paper_340m, wider.

Finding:  kconv3 at B=128: LM accuracy 52.7, RULER 68.2 %; MoBA then matches dense attention.
Command:  python -m experiments study language_model --preset paper-1b   (needs a network and the extra [huggingface])
Hardware: a pod; 100B tokens. It has been built and lowered here, never trained.

Width, heads and MLP are the paper's. Ours, and so to be checked: 16 layers, which give 1.14B parameters with tied
embeddings (24 would give 1.68B), and the learning rate.
"""

import dataclasses

import experiments.configs.paper_340m as paper_340m
from experiments.preset import Preset

MODEL = dataclasses.replace(paper_340m.MODEL, num_layers=16, hidden_size=2048, num_heads=32, mlp_size=8192)


def preset() -> Preset:
    """The studies of paper_340m with the larger model."""
    return paper_340m.preset("paper-1b", MODEL, learning_rate=5e-4)
