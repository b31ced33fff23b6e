"""Prints the table of systems as Markdown: `python -m sparse_attn.systems > docs/systems.md`."""

import dataclasses
import importlib
import pkgutil

from sparse_attn import systems
from sparse_attn.systems.recipe import Recipe


def find_recipes() -> dict[str, Recipe]:
    """The recipe of every system, by the name of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(systems.__path__))
    modules = {name: importlib.import_module(f"sparse_attn.systems.{name}") for name in names if name[0] != "_"}
    return {name: module.RECIPE for name, module in modules.items() if hasattr(module, "RECIPE")}


def make_page() -> str:
    """The page docs/systems.md."""
    columns = [
        field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "paper", "is_trainable")
    ]
    head = ["system", *columns, "trained"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for module, recipe in find_recipes().items():
        link = f"[{recipe.name}](../sparse_attn/systems/{module}.py) ([{recipe.paper}](https://arxiv.org/abs/{recipe.paper}))"
        cells = [str(getattr(recipe, name)).replace("|", "\\|") for name in columns]
        lines.append("| " + " | ".join([link, *cells, "yes" if recipe.is_trainable else ""]) + " |")
    return "\n".join(
        [
            "# The systems, and what they are made of",
            "",
            "Printed from the code by `python -m sparse_attn.systems > docs/systems.md`; a test keeps it up to date. A",
            "system is one file over the parts of `sparse_attn/grammar/`: When, Order, Blocks, Describe, Score,",
            "Choose, Attend (an exact softmax over the choice), Rest, Merge. Sizes of blocks are query / key tokens.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    print(make_page(), end="")
