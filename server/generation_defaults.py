"""What applies where a request is silent: the checkpoint's own defaults, a file's, or the command line's.

The names are those of Hugging Face's generation_config.json. Of these, what a request could ask for is read,
and the end tokens; `do_sample` is not: whether to sample is said by the temperature, as in OpenAI's API.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from engine.checkpoint import CheckpointError
from engine.weights.json_files import read_json_object
from engine.weights.paths import named_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.checkpoint import Checkpoint
    from server.config import ServerConfig
    from server.tokenizer import Tokenizer

MODEL, NONE = "model", "none"  # values of the setting that are no path
_FILE = "generation_config.json"
_END_IDS = "eos_token_id"
# What a request may ask for; a default must not be what a request could not say. A top_k of -1 is off.
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "typical_p": (sys.float_info.min, 1.0),
    "repetition_penalty": (sys.float_info.min, 10.0),
    "max_new_tokens": (1, 2**31 - 1),
}
# What changes a text in Hugging Face's own generation, and is not read here
_UNREAD = (
    "num_beams",
    "num_beam_groups",
    "penalty_alpha",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "guidance_scale",
    "min_new_tokens",
    "stop_strings",
)
_WHOLE = frozenset({"top_k", "max_new_tokens"})
_SHOWN_CHARS = 80
_WAY_OUT = "--generation-config none leaves such defaults out"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # of a chat; None: all that fits
    eos_token_ids: tuple[int, ...] = ()

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults of OpenAI's API."""
        plain = type(self)()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(plain, name)}


def generation_defaults(
    config: ServerConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None = None
) -> GenerationDefaults:
    """The defaults of this server; the tokeniser knows an end token that the checkpoint names by its text.

    Raises CheckpointError for a value that no request could ask for, naming where it stands.
    """
    source, given = _given(config.generation_config, checkpoint)
    values = _checked(source, given)
    ends = _end_ids(source, given) if _is_path(config.generation_config) else ()
    ends = (*(ends or checkpoint.eos_token_ids), *_named_end(checkpoint, tokenizer))
    if config.override_generation_config:
        overrides = _parsed(config.override_generation_config)
        values |= _checked("override_generation_config", overrides)
        if _END_IDS in overrides:
            ends = _end_ids("override_generation_config", overrides)
    return GenerationDefaults(**values, eos_token_ids=tuple(dict.fromkeys(ends)))


def unread(generation: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json asks for that is not applied."""
    return [name for name in _UNREAD if generation.get(name) not in (None, 0, 1, [])]


def _given(setting: str, checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]]:
    """Where the defaults come from, for errors, and what stands there."""
    if setting == NONE:
        return "", {}
    if not _is_path(setting):
        if checkpoint.generation_problem:
            raise CheckpointError(f"{checkpoint.generation_problem}; {_WAY_OUT}")
        return f"{checkpoint.path}: the model's generation defaults", checkpoint.generation
    path = named_path(setting, "generation_config")
    path = path / _FILE if path.is_dir() else path
    return f"generation_config {path}", read_json_object(path)


def _is_path(setting: str) -> bool:
    return setting not in (MODEL, NONE)


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"override_generation_config is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError('override_generation_config must be a JSON object, as {"temperature": 0.5}')
    unknown = sorted(value.keys() - {*_RANGES, _END_IDS})
    if unknown:
        known = ", ".join([*_RANGES, _END_IDS])
        raise CheckpointError(
            f"override_generation_config: no '{unknown[0][:_SHOWN_CHARS]}'; known are {known}"
        )
    return value


def _checked(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The known numbers among `given`; null is absent."""
    values: dict[str, Any] = {}
    for name, (low, high) in _RANGES.items():
        value = given.get(name)
        if value is None:
            continue
        if (
            type(value) not in (int, float)
            or not low <= value <= high
            or (name in _WHOLE and value != int(value))
        ):
            shown, kind = str(value)[:_SHOWN_CHARS], "a whole number" if name in _WHOLE else "a number"
            raise CheckpointError(
                f"{source}: {name} = {shown} is not {kind} between {low:g} and {high:g}; {_WAY_OUT}"
            )
        values[name] = max(0, int(value)) if name in _WHOLE else float(value)
    return values


def _end_ids(source: str, given: Mapping[str, Any]) -> tuple[int, ...]:
    value = given.get(_END_IDS)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**31:
            raise CheckpointError(
                f"{source}: {_END_IDS} = {str(value)[:_SHOWN_CHARS]} is not a token id or a list"
            )
    return tuple(ids)


def _named_end(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    text = checkpoint.special_tokens.get("eos_token")
    if tokenizer is None or not text:
        return ()
    ids = tokenizer.encode(text, special=True)
    return tuple(ids) if len(ids) == 1 else ()
