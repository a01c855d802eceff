"""Stretched rotary positions within and beyond the original context, in every spelling."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from engine.models.config import Rope, RopeScaling, ScalingKind
from engine.models.rotary import inverse_frequencies
from tests.engine.families.references import (
    LLAMA3_ROPE,
    VOCAB,
    YARN_ROPE,
    Case,
    build,
    logits_of,
    logits_one_by_one,
    longrope,
)
from tests.engine.families.served import serve

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

ORIGINAL = 64  # tokens of the original context
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
YARNS = {
    "yarn": YARN_ROPE | {"truncate": True},
    "yarn_untruncated": YARN_ROPE,
    "yarn_factor": YARN_ROPE | {"attention_factor": 0.7},
    "yarn_mscale": YARN_ROPE | {"mscale": 1.3, "mscale_all_dim": 0.6},
    "yarn_mscale_equal": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn_betas": YARN_ROPE | {"beta_fast": 8.0, "beta_slow": 2.0},
}
STEP = LLAMA3_ROPE | {"high_freq_factor": 1.0}  # Llama 4's
PLAIN = {
    "linear": LINEAR,
    "llama3": LLAMA3_ROPE,
    "llama3_step": STEP,
    "longrope": longrope(16, ORIGINAL),
    **YARNS,
}


def reference(rope: dict[str, Any], folder: Path, max_positions: int = 512) -> PreTrainedModel:
    case = Case(
        "Llama",
        "llama",
        {"rope_parameters": {"rope_theta": 10000.0} | rope, "head_dim": 16, "num_hidden_layers": 2}
        | {"max_position_embeddings": max_positions},
    )
    model = build(case)
    model.save_pretrained(folder)
    return model


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", PLAIN.values(), ids=PLAIN)
def test_beyond_the_original_context(rope: dict[str, Any], tmp_path: Path) -> None:
    model = reference(rope, tmp_path)
    (text,) = serve(tmp_path, [prompt(140)], step_tokens=50, num_tokens=8)
    assert_close(text.logits, logits_of(model, text.tokens)[:-1])


@pytest.mark.parametrize("step_tokens", [23, 256])
def test_dynamic_positions_are_those_of_a_text_that_grew_token_by_token(
    tmp_path: Path, step_tokens: int
) -> None:
    model = reference(DYNAMIC, tmp_path, max_positions=ORIGINAL)
    (text,) = serve(tmp_path, [prompt(140)], step_tokens=step_tokens, num_tokens=8)
    assert_close(text.logits, logits_one_by_one(model, text.tokens)[:-1])


def test_longrope_has_short_factors_where_the_served_context_is_the_original_one(tmp_path: Path) -> None:
    model = reference(longrope(16, ORIGINAL), tmp_path)
    (text,) = serve(tmp_path, [prompt(50)], step_tokens=256, num_tokens=8, max_model_len=ORIGINAL)
    assert_close(text.logits, logits_of(model, text.tokens)[:-1])


def test_longrope_has_long_factors_for_short_texts_too_where_more_is_served(tmp_path: Path) -> None:
    """They are computed once: a key in the cache cannot change when its text grows beyond the original
    context. So it is the beginning of a long text that the reference agrees with."""
    model = reference(longrope(16, ORIGINAL), tmp_path)
    (text,) = serve(tmp_path, [prompt(30)], step_tokens=256, num_tokens=4, max_model_len=ORIGINAL + 1)
    padded = text.tokens + [3] * ORIGINAL
    assert_close(text.logits, logits_of(model, padded)[: len(text.logits)])


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, YARN_ROPE, longrope(16, ORIGINAL)])
def test_the_older_spelling(rope: dict[str, Any], tmp_path: Path) -> None:
    model = reference(rope, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    written = config.pop("rope_parameters")
    kind = {"longrope": "su"}.get(written["rope_type"], written["rope_type"])
    older = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_type")}
    config |= {"rope_theta": written["rope_theta"], "rope_scaling": older | {"type": kind}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (text,) = serve(tmp_path, [prompt(90)], step_tokens=256, num_tokens=2)
    assert_close(text.logits, logits_of(model, text.tokens)[:-1])


def test_a_frequency_at_the_edge_of_equal_bands_is_a_number() -> None:
    edge = (64 * torch.ones(1) / (2 * torch.pi)).item()
    scaling = RopeScaling(
        kind=ScalingKind.LLAMA3,
        factor=8.0,
        original_max_positions=64,
        low_freq_factor=edge,
        high_freq_factor=edge,
    )
    found = inverse_frequencies(Rope(theta=10000.0, num_rotated=8, scaling=scaling))
    assert found[0] == 1 / 8
