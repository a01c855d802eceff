"""Which files of a repository are fetched, and that a repository without a model says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from engine.weights import hub
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("file", "fetched"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("model-00001-of-00003.safetensors", True),
        ("model.safetensors.index.json", True),
        ("gptq_model-4bit-128g.safetensors", True),
        ("tokenizer.model", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("added_tokens.json", True),
        ("special_tokens_map.json", True),
        ("chat_template.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("consolidated.safetensors", False),
        ("original/model.safetensors", False),
        ("model/copy.safetensors", False),
        ("adapter_model.safetensors", False),
        ("modeling_own.py", False),
        ("model.Q4_K.gguf", False),
        ("onnx/model.onnx", False),
        ("README.md", False),
    ],
)
def test_what_is_read_is_fetched_and_nothing_else(file: str, fetched: bool) -> None:
    kept = filter_repo_objects([file], allow_patterns=list(hub.FILES), ignore_patterns=list(hub.IGNORED))
    assert bool(list(kept)) is fetched


def test_the_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **options: asked.append(options) or tmp_path
    )
    with pytest.raises(CheckpointError, match=r"'owner/name' at revision 'v2' has no config.json.*\.gguf"):
        hub.fetch("owner/name", "v2")
    assert asked[0]["revision"] == "v2"
    (tmp_path / "config.json").write_text("{}")
    assert hub.fetch("owner/name") == tmp_path
    assert asked[1]["revision"] is None
