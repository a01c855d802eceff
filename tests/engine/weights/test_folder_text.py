"""What a folder says about text: special tokens and templates, wherever they are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine.weights import folder_text

if TYPE_CHECKING:
    from pathlib import Path


def texts(path: Path, **files: Any) -> folder_text.FolderText:
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return folder_text.read(path)


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    found = texts(
        tmp_path,
        tokenizer_config={"bos_token": None, "eos_token": {"content": "</s>"}},
        special_tokens_map={"bos_token": "<s>", "eos_token": "<x>", "pad_token": {"content": "<pad>"}},
        added_tokens={"</s>": 7, "<x>": 8},
    )
    assert found.special_tokens() == {"eos_token": "</s>", "pad_token": "<pad>"}
    assert found.named_end_ids() == (7,)


def test_ids_that_are_none_are_no_ends(tmp_path: Path) -> None:
    found = texts(tmp_path, tokenizer_config={"eos_token": "</s>"}, added_tokens={"</s>": "7"})
    assert found.named_end_ids() == ()


def test_ids_of_added_tokens_are_digits_and_few(tmp_path: Path) -> None:
    entries = {token: {"content": "</s>"} for token in ("7", "9" * 5000, "\u0663", "-1", "x")}
    found = texts(tmp_path, tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": entries})
    assert found.named_end_ids() == (7,)


def test_one_template_or_several_by_name(tmp_path: Path) -> None:
    assert texts(tmp_path, tokenizer_config={"chat_template": "a"}).chat_templates() == {"default": "a"}
    named = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
        {"name": "../x", "template": "c"},
        5,
    ]
    found = texts(tmp_path, tokenizer_config={"chat_template": named}).chat_templates()
    assert found == {"default": "a", "tool_use": "b"}
    found = texts(
        tmp_path, tokenizer_config={"chat_template": {"default": "a", "rag": "d", "x": 1}}
    ).chat_templates()
    assert found == {"default": "a", "rag": "d"}


def test_files_of_templates_precede(tmp_path: Path) -> None:
    files = {"chat_template": {"chat_template": "processor"}, "tokenizer_config": {}}
    assert texts(tmp_path, **files).chat_templates() == {"default": "processor"}
    files["tokenizer_config"] = {"chat_template": "configured"}
    assert texts(tmp_path, **files).chat_templates() == {"default": "configured"}
    (tmp_path / "chat_template.jinja").write_text("own file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert texts(tmp_path, **files).chat_templates() == {"default": "own file", "tool_use": "tools"}


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    found = texts(tmp_path)
    assert (found.special_tokens(), found.named_end_ids(), found.add_bos(), found.chat_templates()) == (
        {},
        (),
        None,
        {},
    )
