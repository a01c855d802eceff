"""What a PEFT adapter's adapter_config.json asks for, and what of it can be merged into weights. No torch.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.models.fields import Fields
from engine.weights.json_files import read_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "adapter_config.json"

# Where these are set, the weights of the base, the products or the inputs differ from plain LoRA's.
_UNSET = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # the others begin by changing the base's weights
_PLAIN_PATTERN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    alpha: float
    alphas: Mapping[str, float]  # by the end of a module's name; the first that fits
    ranks: frozenset[int]
    by_square_root: bool  # rank-stabilised: alpha / sqrt(r) instead of alpha / r
    magnitudes: bool  # DoRA

    def scale(self, module: str, rank: int) -> float:
        """What the product of the two small matrices is multiplied by."""
        fitting = (alpha for end, alpha in self.alphas.items() if f".{module}".endswith(f".{end}"))
        return next(fitting, self.alpha) / (rank**0.5 if self.by_square_root else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Raises CheckpointError for what is not LoRA, or LoRA of a kind that is not supported."""
    path = folder / CONFIG
    fields = Fields(f"{path}:", read_json_object(path))
    fields.check("peft_type", "LORA")
    fields.check("bias", "none")
    fields.check("fan_in_fan_out", False)
    fields.check("init_lora_weights", *_INITIAL)
    for name in _UNSET:
        value = fields.values.get(name)
        if value not in (None, False, [], {}):
            raise fields.unsupported(name, value)
    alphas = fields.within("alpha_pattern")
    ranks = fields.within("rank_pattern").values.values()
    return AdapterSettings(
        alpha=fields.number("lora_alpha", 8.0),
        alphas={_module_end(fields, end): alphas.number(end) for end in alphas.values},
        ranks=frozenset({fields.count("r", 8), *(_rank(fields, rank) for rank in ranks)}),
        by_square_root=fields.flag("use_rslora"),
        magnitudes=fields.flag("use_dora"),
    )


def _rank(fields: Fields, value: object) -> int:
    return Fields(fields.source, {"rank_pattern": value}).count("rank_pattern")


def _module_end(fields: Fields, pattern: str) -> str:
    """A module's name or its end. PEFT takes any regular expression, which could run for ever."""
    end = pattern.removeprefix("^")
    if not end or not set(end) <= _PLAIN_PATTERN_CHARS:
        raise fields.unsupported("alpha_pattern", pattern, "; the end of a module's name is")
    return end
