"""Presets: what each study runs at one scale. One file a preset, whose header says finding, command, hardware, time."""

from collections.abc import Callable

from experiments.configs import paper_1b, paper_340m, small, tiny
from experiments.preset import Preset

PRESETS: dict[str, Callable[[], Preset]] = {
    "tiny": tiny.preset,
    "small": small.preset,
    "paper-340m": paper_340m.preset,
    "paper-1b": paper_1b.preset,
}


def load_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
