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
    fields = {field.name: field for field in dataclasses.fields(system)}

    def signature(name: str) -> str:
        """The name of a field with its default, if it has one."""
        default, make_default = fields[name].default, fields[name].default_factory
        if make_default is not dataclasses.MISSING:
            default = make_default()
        return name if default is dataclasses.MISSING else f"{name} = {default!r}"

    def yes(name: str) -> str:
        """What a class attribute says, no where there is none."""
        return "yes" if getattr(system, name, False) else "no"

    causal = "as `is_causal` says" if "is_causal" in fields else yes("is_causal")
    facts = f"Causal: {causal}. Trained: {yes('is_trainable')}. Packed rows when traced: {yes('traces_sequences')}."
    path = f"{system.__module__}.{system.__name__}"
    own = [name for name in attributes if name in fields and name not in System.__dataclass_fields__]
    return "\n".join(
        [
            f"## {system.__name__} ([{system.paper}](https://arxiv.org/abs/{system.paper}))",  # type: ignore[attr-defined]
            "",
            f"[`{path}`](api/systems.md#{path}). {facts}",
            "",
            text,
            "",
            *(f"* `{signature(name)}`: {attributes[name]}" for name in own),
            *([""] if own else []),
        ]
    )


def make_page() -> str:
    """The page docs/systems.md."""
    return "\n".join([_HEAD, *map(make_card, find_systems())])


if __name__ == "__main__":
    print(make_page(), end="")
