"""Do smaller blocks route better at an equal number of attended tokens? Dense attention is the ceiling."""

from pathlib import Path
from typing import Any

from experiments.config import to_dict
from experiments.preset import Preset
from experiments.studies.recall import describe_recall
from experiments.studies.variants import dense, moba, train_variants, write_study


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Trains every block size of the preset, and dense attention, on recall; writes block_size/study.json."""
    base, seeds = preset.recall, preset.recall_seeds
    variants = [moba(base.model, *blocks) for blocks in preset.block_sizes] + [dense(base.model)]

    def measure() -> dict[str, Any]:
        trained = train_variants(base, variants, seeds, out, "recall", "accuracy", preset.processes)
        return {
            **describe_recall(base),
            "budget": preset.block_sizes[0][0] * preset.block_sizes[0][1],
            "variants": trained,
        }

    settings = {"base": to_dict(base), "seeds": seeds, "block_sizes": preset.block_sizes}
    return write_study(out, "block_size", preset.name, settings, measure)
