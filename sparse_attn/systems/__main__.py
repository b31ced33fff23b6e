"""Prints a card for every system as Markdown: `python -m sparse_attn.systems > docs/systems.md`."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

from sparse_attn import systems
from sparse_attn.systems.system import System

_HEAD = """\
# The systems

Printed from the code by `python -m sparse_attn.systems > docs/systems.md`; a test keeps it up to date. Every system is
one file over the parts of `sparse_attn/grammar/` and has `scale` and `implementation`, as `moba_attention` has them,
besides the fields listed here. "Packed rows when traced" says whether `segment_ids` and `seq_lengths` may be traced;
elsewhere they must be known when the call is traced, or are refused with the reason.
"""


def find_systems() -> list[type]:
    """The class of every system, in the order of their modules: what a module here defines and has a paper."""
    names = sorted(module.name for module in pkgutil.iter_modules(systems.__path__) if module.name != "__main__")
    modules = [importlib.import_module(f"sparse_attn.systems.{name}") for name in names]
    classes = [(module, value) for module in modules for value in vars(module).values() if inspect.isclass(value)]
    return [value for module, value in classes if value.__module__ == module.__name__ and hasattr(value, "paper")]


def split_docstring(system: type) -> tuple[str, dict[str, str]]:
    """The text of a class docstring, and its Attributes: name -> what is said of it."""
    text, _, attributes = (inspect.getdoc(system) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
    return text.strip(), {name: " ".join(said.split()) for name, said in entries}


def make_card(system: type) -> str:
    """The card of one system."""
    text, attributes = split_docstring(system)
    fields = {field.name: field for field in dataclasses.fields(system)}  # type: ignore[arg-type]

    def default(name: str) -> str:
        field = fields[name]
        if field.default_factory is not dataclasses.MISSING:
            return repr(field.default_factory())
        return "required" if field.default is dataclasses.MISSING else repr(field.default)

    facts = {
        "Causal": "as `is_causal` says" if "is_causal" in fields else system.is_causal,  # type: ignore[attr-defined]
        "Trained": getattr(system, "is_trainable", False),
        "Packed rows when traced": getattr(system, "traces_sequences", False),
    }
    words = {True: "yes", False: "no"}
    module = system.__module__.rpartition(".")[2]
    own = [name for name in attributes if name not in {field.name for field in dataclasses.fields(System)}]
    return "\n".join(
        [
            f"## {system.__name__} ([{system.paper}](https://arxiv.org/abs/{system.paper}))",  # type: ignore[attr-defined]
            "",
            f"[`sparse_attn.systems.{module}`](../sparse_attn/systems/{module}.py). "
            + " ".join(f"{fact}: {words.get(said, said)}." for fact, said in facts.items()),
            "",
            text,
            "",
            *(f"* `{name}` ({default(name)}): {attributes[name]}" for name in own),
            *([""] if own else []),
        ]
    )


def make_page() -> str:
    """The page docs/systems.md."""
    return "\n".join([_HEAD, *map(make_card, find_systems())])


if __name__ == "__main__":
    print(make_page(), end="")
