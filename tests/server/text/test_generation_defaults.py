"""The defaults of generation: where they come from, which precede, and what is refused by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from engine.checkpoint import Checkpoint, CheckpointError, locate
from server.config import ServerConfig
from server.generation_defaults import GenerationDefaults, generation_defaults

if TYPE_CHECKING:
    from pathlib import Path

    from server.tokenizer import Tokenizer

GENERATION = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "typical_p": 0.7,
    "repetition_penalty": 1.1,
    "max_new_tokens": 99,
}


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> Checkpoint:
    return locate(str(smollm2_gguf))


def defaults(checkpoint: Checkpoint, given: dict[str, Any], **settings: str) -> GenerationDefaults:
    return generation_defaults(ServerConfig(**settings), replace(checkpoint, generation=given))  # type: ignore[arg-type]


def test_the_models_own_are_read(checkpoint: Checkpoint) -> None:
    found = defaults(checkpoint, {**GENERATION, "do_sample": False, "num_beams": 4})
    assert found == GenerationDefaults(**GENERATION, eos_token_ids=checkpoint.eos_token_ids)
    assert defaults(checkpoint, {"top_k": -1, "top_p": None}).changed() == {
        "eos_token_ids": checkpoint.eos_token_ids
    }


def test_none_leaves_openais_but_keeps_the_end_tokens(checkpoint: Checkpoint) -> None:
    found = defaults(checkpoint, {"temperature": 99}, generation_config="none")
    assert found == GenerationDefaults(eos_token_ids=checkpoint.eos_token_ids)


def test_defaults_that_cannot_be_read_end_the_start_only_where_they_are_wanted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    broken = replace(checkpoint, generation_problem="generation_config.json: not JSON")
    with pytest.raises(CheckpointError, match=r"not JSON; --generation-config none leaves") as caught:
        defaults(broken, {})
    assert "\n" not in str(caught.value)
    plain = GenerationDefaults(eos_token_ids=checkpoint.eos_token_ids)
    assert defaults(broken, {}, generation_config="none") == plain
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert defaults(broken, {}, generation_config=str(tmp_path)).temperature == 0.5


def test_the_embedded_model_has_its_model_cards_sampling(smollm2_gguf: Path) -> None:
    """At OpenAI's temperature of 1 it talked nonsense to whoever tried it first."""
    own = locate("")
    for settings, expected in (
        ({}, (0.2, 0.9)),
        ({"generation_config": "none"}, (1.0, 1.0)),
        ({"override_generation_config": '{"temperature": 1}'}, (1.0, 0.9)),
    ):
        found = generation_defaults(ServerConfig(**settings), own)  # type: ignore[arg-type]
        assert (found.temperature, found.top_p) == expected


def test_a_file_or_its_folder_replaces_the_models_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.3, "eos_token_id": [7, 8]}))
    for name in (path, tmp_path):
        found = defaults(checkpoint, GENERATION, generation_config=str(name))
        assert found == GenerationDefaults(temperature=0.3, eos_token_ids=(7, 8))
    with pytest.raises(CheckpointError, match="absent"):
        defaults(checkpoint, {}, generation_config=str(tmp_path / "absent"))


def test_overrides_precede(checkpoint: Checkpoint) -> None:
    override = '{"temperature": 0, "top_k": -1, "eos_token_id": 5}'
    found = defaults(checkpoint, GENERATION, override_generation_config=override)
    rest = {name: value for name, value in GENERATION.items() if name not in ("temperature", "top_k")}
    assert found == GenerationDefaults(temperature=0.0, top_k=0, **rest, eos_token_ids=(5,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("temperature=1", "not JSON"),
        ("[]", "a JSON object"),
        ('{"temprature": 1}', "no 'temprature'; known are temperature, top_p"),
        ('{"temperature": 3}', "temperature = 3 is not a number between 0 and 2"),
        ('{"eos_token_id": ["a"]}', "eos_token_id"),
        ('{"eos_token_id": -1}', "eos_token_id"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_an_override_that_cannot_be_is_one_line(checkpoint: Checkpoint, override: str, why: str) -> None:
    with pytest.raises(CheckpointError, match="override_generation_config") as caught:
        defaults(checkpoint, {}, override_generation_config=override)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("typical_p", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11),
        ("repetition_penalty", "1.0"),
        ("max_new_tokens", 0),
        ("min_p", True),
    ],
)
def test_a_default_out_of_range_is_named_with_the_way_out(
    checkpoint: Checkpoint, name: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        defaults(checkpoint, {name: value})
    assert "--generation-config none" in str(caught.value)


def test_the_tokenisers_own_end_token_ends_too(checkpoint: Checkpoint, smollm2: Tokenizer) -> None:
    """transformers 5 writes its id nowhere but in tokenizer.json."""
    bare = replace(checkpoint, eos_token_ids=(9,), special_tokens={"eos_token": "<|im_end|>"})
    assert generation_defaults(ServerConfig(), bare, smollm2).eos_token_ids == (9, 2)
    unknown = replace(bare, special_tokens={"eos_token": "two words"})
    assert generation_defaults(ServerConfig(), unknown, smollm2).eos_token_ids == (9,)
