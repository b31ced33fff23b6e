"""Does a short convolution on the keys help routing? Same blocks, widths 0 (none), 3 and 5."""

from pathlib import Path
from typing import Any

from experiments.config import to_dict
from experiments.preset import Preset
from experiments.studies.recall import describe_recall
from experiments.studies.variants import moba, train_variants, write_study


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Trains every width of the preset on associative recall; writes key_convolution/study.json."""
    base, seeds = preset.recall, preset.recall_seeds
    variants = [moba(base.model, *preset.key_conv_block, width) for width in preset.key_conv_widths]

    def measure() -> dict[str, Any]:
        trained = train_variants(base, variants, seeds, out, "recall", "accuracy", preset.processes)
        return {**describe_recall(base), "variants": trained}

    settings = {
        "base": to_dict(base),
        "seeds": seeds,
        "block": preset.key_conv_block,
        "widths": preset.key_conv_widths,
    }
    return write_study(out, "key_convolution", preset.name, settings, measure)
