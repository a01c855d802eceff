"""Every family from a GGUF file, written as llama.cpp's converter would: the reference's logits again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.families.gguf_files import write_gguf
from tests.engine.families.references import CASES, build
from tests.engine.families.served import serve
from tests.engine.families.test_folders import SLICED, assert_as_the_reference, prompts

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["prompts"]
IN_GGUF = [name for name, case in CASES.items() if case.gguf]


@pytest.mark.parametrize("name", IN_GGUF)
def test_logits_and_greedy_text(name: str, prompts: list[list[int]], tmp_path: Path) -> None:
    model = build(CASES[name])
    path = tmp_path / "model.gguf"
    write_gguf(model, CASES[name].gguf, path)
    texts = serve(path, prompts, step_tokens=SLICED, num_tokens=40)
    for text, prompt in zip(texts, prompts, strict=True):
        assert_as_the_reference(text, prompt, model)


def test_the_first_files_of_mixtral_had_a_tensor_for_each_expert(
    prompts: list[list[int]], tmp_path: Path
) -> None:
    model = build(CASES["mixtral"])
    write_gguf(model, "llama", tmp_path / "model.gguf", experts_apart=True)
    (text,) = serve(tmp_path / "model.gguf", prompts[1:], step_tokens=SLICED, num_tokens=4)
    assert_as_the_reference(text, prompts[1], model)
