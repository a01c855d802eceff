"""The checkpoint's own defaults of sampling."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from engine.checkpoint import CheckpointError, locate
from server.sampling import SamplingDefaults

if TYPE_CHECKING:
    from pathlib import Path

GENERATION = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


def folder_with(source: Path, tmp_path: Path, **generation: object) -> str:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)


def test_defaults_are_read(smollm2_folder: Path, tmp_path: Path) -> None:
    checkpoint = locate(folder_with(smollm2_folder, tmp_path, **GENERATION))
    assert SamplingDefaults.of(checkpoint) == SamplingDefaults(**GENERATION)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11),
        ("repetition_penalty", "1.0"),
        ("min_p", True),
    ],
)
def test_a_default_out_of_range_is_named(
    smollm2_folder: Path, tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=name):
        locate(folder_with(smollm2_folder, tmp_path, **{name: value}))
