"""The record that says in a few words what a system is made of; `docs/systems.md` is printed from these."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the table of systems: what each part of the grammar (`sparse_attn.grammar`) is in this system."""

    name: str
    paper: str  # arXiv number
    blocks: str  # sizes of query and key blocks, in tokens
    describe: str
    score: str
    choose: str
    order: str = "as is"
    rest: str = "drop"
    merge: str = "one softmax"
    when: str = "always"
    is_trainable: bool = False  # whether its gradients are part of the published system and tested here
