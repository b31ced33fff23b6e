"""MoBA: every query token attends the few key blocks whose mean key it matches best.

Paper: MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189). `sparse_attn.moba_attention` is this
system; the file gives it the calling convention of the others.

Where code and paper disagree: some implementations take full attention for top_k=1; here it is the own block (S2).
"""

from sparse_attn.attention import moba_attention as attention
from sparse_attn.attention import route_moba as select
from sparse_attn.systems.recipe import Recipe

__all__ = ["RECIPE", "attention", "select"]

RECIPE = Recipe(
    name="MoBA",
    paper="2502.13189",
    blocks="1 / any",
    describe="mean key",
    score="dot",
    choose="per query token and head: top-k, own block forced and counted",
    is_trainable=True,
)
