"""Vocabularies are the same where nearly all ids mean the same; rows beyond the tokens do not count."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from engine.checkpoint import Checkpoint, locate
from engine.drafting.models.same_vocabulary import same_vocabulary
from tests.engine.tiny import TINY
from tests.engine.weights.folder import config_json
from tests.engine.weights.stored import write

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = [f"t{number}" for number in range(280)]


def checkpoint(folder: Path, tokens: list[str] | None, num_rows: int = 300) -> Checkpoint:
    folder.mkdir()
    write(folder, {"x": torch.ones(1)}, config_json(replace(TINY, vocab_size=num_rows)))
    if tokens is not None:
        vocab = {text: token for token, text in enumerate(tokens)}
        model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None}
        document = {"version": "1.0", "model": model, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return locate(str(folder))


@pytest.mark.parametrize(
    ("tokens", "num_rows", "is_same"),
    [
        (TOKENS, 300, True),
        (TOKENS, 320, True),
        ([*TOKENS, "more"], 300, True),
        ([*TOKENS[:278], "<a>", "<b>"], 300, True),
        (TOKENS[:278], 300, True),
        (TOKENS[:270], 300, False),
        ([*TOKENS[1:], TOKENS[0]], 300, False),
        (None, 300, True),
        (None, 320, False),
    ],
    ids=[
        "equal",
        "more rows",
        "one more",
        "renamed",
        "two fewer",
        "ten fewer",
        "shifted",
        "none",
        "none, more rows",
    ],
)
def test_by_texts_of_tokens_else_by_rows(tmp_path, tokens, num_rows, is_same):
    target = checkpoint(tmp_path / "target", TOKENS)
    draft = checkpoint(tmp_path / "draft", tokens, num_rows)
    assert same_vocabulary(draft, target, 300) is is_same
    assert same_vocabulary(draft, None, num_rows), "nothing is known of the target but its rows"
