"""A language model on real text: dense attention, MoBA with large and small blocks, and with key convolution."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.config import to_dict
from experiments.preset import Preset
from experiments.studies.variants import dense, moba, train_variants, write_study

KEY_CONV_WIDTH = 3  # kconv3, which the paper prefers for language modelling


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Trains the preset's language models; writes language_model/study.json."""
    base, seeds = preset.language_model, preset.language_model_seeds
    plain = dataclasses.replace(base.model, key_conv_width=0)
    small = preset.language_model_blocks[-1]
    variants = [
        dense(plain),
        *(moba(plain, *blocks) for blocks in preset.language_model_blocks),
        moba(plain, *small, KEY_CONV_WIDTH),
    ]
    data, model = base.data, base.model
    corpus = "Python source files of this machine, byte by byte" if data.task == "text" else data.dataset
    setting = (
        f"Language model on {corpus}: {data.sequence_length} tokens of context, {model.num_layers} layers of "
        f"{model.hidden_size} features, {base.train.steps} steps of {data.batch_size} sequences."
    )

    def measure() -> dict[str, Any]:
        trained = train_variants(base, variants, seeds, out, "language_model", "bits_per_byte", preset.processes)
        return {
            "metric": "bits_per_byte",
            "higher_is_better": False,
            "chance": None,
            "setting": setting,
            "variants": trained,
        }

    settings = {"base": to_dict(base), "seeds": seeds, "blocks": preset.language_model_blocks}
    return write_study(out, "language_model", preset.name, settings, measure)
