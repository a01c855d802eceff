"""Every family from a folder: the logits of Hugging Face's own model, and so its greedy text.

In whole prompts, in prompts cut into uneven slices beside others, and token by token through pages, far
beyond windows, chunks, pages and blocks of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.families.references import CASES, VOCAB, build, logits_of
from tests.engine.families.served import Text, serve

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NUM_GREEDY = 40  # beyond a block of keys, and where the shorter text outgrows what longrope calls short
PROMPT_LENGTHS = (107, 30)
WHOLE, SLICED = 256, 23  # tokens a step


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    model = build(CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def assert_as_the_reference(text: Text, prompt: list[int], model: PreTrainedModel) -> None:
    expected = logits_of(model, text.tokens)
    assert len(text.logits) == len(text.tokens) - 1
    torch.testing.assert_close(text.logits, expected[:-1], atol=1e-4, rtol=1e-4)
    # Greedy decoding of the reference, by induction: every token is its choice after those before.
    assert text.tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(1).tolist()


@pytest.fixture(scope="module")
def texts(saved: tuple[PreTrainedModel, Path], prompts: list[list[int]]) -> list[Text]:
    """Each prompt computed at once, beside the other one's."""
    return serve(saved[1], prompts, step_tokens=WHOLE, num_tokens=NUM_GREEDY)


def test_logits_and_greedy_text(
    saved: tuple[PreTrainedModel, Path], prompts: list[list[int]], texts: list[Text]
) -> None:
    for text, prompt in zip(texts, prompts, strict=True):
        assert len(text.tokens) == len(prompt) + NUM_GREEDY
        assert_as_the_reference(text, prompt, saved[0])


def test_every_logit_has_the_same_bits_however_its_prompt_was_cut(
    saved: tuple[PreTrainedModel, Path], prompts: list[list[int]], texts: list[Text]
) -> None:
    sliced = serve(saved[1], prompts, step_tokens=SLICED, num_tokens=NUM_GREEDY)
    alone = serve(saved[1], prompts[:1], step_tokens=50, num_tokens=8)
    for one, other in zip(sliced, texts, strict=True):
        assert torch.equal(one.logits, other.logits)
    assert torch.equal(alone[0].logits, texts[0].logits[: len(alone[0].logits)])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_as_newer_files_may_have_them(
    name: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path, save_original_format=False)
    (text,) = serve(tmp_path, prompts[1:], step_tokens=SLICED, num_tokens=8)
    assert_as_the_reference(text, prompts[1], model)
