"""Which drafter a checkpoint is, what is refused and how, from real folders."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.checkpoint import CheckpointError
from engine.drafting.guess import Want
from engine.drafting.loading import Kind, find_drafters, kind_of, load_drafters
from engine.drafting.models.small_model import SmallModel
from engine.drafting.surroundings import Surroundings
from engine.kv_storage import KVStorage
from tests.engine.drafting.models.small import paths, plain_logits, processor_of, sequence, transformer
from tests.engine.tiny import CPU, TINY, random_weights
from tests.engine.weights.folder import config_json, folder_tensors
from tests.engine.weights.stored import write

if TYPE_CHECKING:
    from pathlib import Path

    from engine.drafting.guess import Drafter
    from engine.models.config import TransformerConfig

FREE = 2**28
DFLASH = {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}


@pytest.fixture
def around() -> Surroundings:
    model = transformer()
    return Surroundings(
        checkpoint=None,
        model=model,
        storage=KVStorage(TINY, 64, 16, torch.float32, CPU),
        batches=BatchBuilder(TINY, pick(CPU), 16, 512, 4, CPU),
        ops=pick(CPU),
        dtype=torch.float32,
        device=CPU,
        max_model_len=512,
        max_num_seqs=4,
        processor_of=processor_of,
    )


def drafters_of(draft_model: str, around: Surroundings, free_bytes: int) -> dict[str, Drafter]:
    found = find_drafters(draft_model, around.checkpoint, around.model.config)
    return load_drafters(found, around, free_bytes)


def folder(tmp_path: Path, name: str, config: TransformerConfig = TINY, **fields: Any) -> Path:
    made = tmp_path / name
    made.mkdir()
    return write(made, folder_tensors(config, random_weights(config, 1)), config_json(config) | fields)


def test_an_ordinary_folder_drafts_as_what_it_is(tmp_path, around, caplog):
    smaller = replace(TINY, layers=TINY.layers[:1], max_positions=200)
    with caplog.at_level(logging.INFO, "octavo.engine"):
        drafters = drafters_of(str(folder(tmp_path, "small", smaller)), around, FREE)
    assert list(drafters) == ["model"]
    drafter = drafters["model"]
    assert isinstance(drafter, SmallModel)
    assert drafter.following.max_len == 200
    assert 0.5 < drafter.cost < 0.9
    lines = [record.getMessage() for record in caplog.records if "drafter" in record.getMessage()]
    assert len(lines) == 1
    assert "drafter model" in lines[0]
    assert "MB" in lines[0]
    text = [5, 6, 7, 8] * 10
    (guess,) = drafter.guess([Want(sequence(text), 8)])
    own = transformer(smaller, seed=1)
    assert paths(guess)[0] == (int(plain_logits(own, text)[0].argmax()),)


def test_pard_is_known_by_its_mask_token(tmp_path, around):
    one = folder(tmp_path, "pard", pard_token=299, spd_type="pard")
    (drafter,) = drafters_of(str(one), around, FREE).values()
    assert drafter.guess([Want(sequence([5, 6, 7]), 8)])[0].tokens
    with pytest.raises(CheckpointError, match="pard_token = 300, but the model knows 300"):
        drafters_of(str(folder(tmp_path, "bad", pard_token=300)), around, FREE)
    with pytest.raises(CheckpointError, match="lacks pard_token"):
        drafters_of(str(folder(tmp_path, "worse", spd_type="pard")), around, FREE)


def test_several_drafters_of_different_kinds_are_loaded_and_two_of_one_kind_refused(tmp_path, around):
    small, pard = folder(tmp_path, "small"), folder(tmp_path, "pard", pard_token=7)
    assert list(drafters_of(f"{small} , {pard}", around, FREE)) == ["model", "pard"]
    with pytest.raises(CheckpointError, match=r"'model': name one of them") as refused:
        drafters_of(f"{small},{pard},{small}", around, FREE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, Kind.EAGLE),
        ({"architectures": ["Eagle3LlamaForCausalLM"], "pard_token": 3}, Kind.EAGLE),
        ({"speculators_model_type": "eagle3", "architectures": ["Whatever"]}, Kind.EAGLE),
        ({"architectures": ["DFlashDraftModel"]}, Kind.DFLASH),
        ({"architectures": ["Qwen3ForCausalLM"], "dflash_config": {"mask_token_id": 1}}, Kind.DFLASH),
        ({"model_type": "medusa", "architectures": ["MedusaModel"]}, Kind.MEDUSA),
        ({"medusa_num_heads": 4, "base_model_name_or_path": "vicuna"}, Kind.MEDUSA),
        ({"architectures": ["Qwen2ForCausalLM"], "pard_token": 3}, Kind.PARD),
        ({"architectures": ["LlamaForCausalLM"], "spd_type": "pard2"}, Kind.PARD),
        ({"architectures": ["LlamaForCausalLM"]}, Kind.MODEL),
        ({}, Kind.MODEL),
        ({"architectures": 5, "model_type": None}, Kind.MODEL),
    ],
)
def test_kinds_by_config(tmp_path, config, kind):
    assert kind_of(write(tmp_path, {"lm_head.weight": torch.ones(2, 2)}, config), config) is kind


def test_eagle_heads_that_call_themselves_a_llama_are_known_by_their_tensors(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    tensors = {name: torch.ones(2, 4) for name in ("fc.weight", "layers.0.self_attn.q_proj.weight")}
    assert kind_of(write(tmp_path, tensors, config), config) is Kind.EAGLE


def test_unknown_speculators_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="speculators_model_type = 'mlp' is not supported"):
        kind_of(tmp_path, {"speculators_model_type": "mlp"})


def test_another_vocabulary_that_cannot_be_read_is_refused(tmp_path, around):
    fewer = replace(TINY, vocab_size=280)
    with pytest.raises(CheckpointError, match="vocabulary"):
        drafters_of(str(folder(tmp_path, "other", fewer)), around, FREE)
    with pytest.raises(CheckpointError, match="take one of its family"):
        drafters_of(str(folder(tmp_path, "pard", fewer, pard_token=3)), around, FREE)


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path, around):
    one = folder(tmp_path, "small")
    with pytest.raises(CheckpointError, match="are free"):
        drafters_of(str(one), around, 2**17)
    with pytest.raises(CheckpointError, match="KV of a draft model"):
        drafters_of(str(one), around, 2**19)
    heads = tmp_path / "heads"
    heads.mkdir()
    write(heads, {"fc.weight": torch.ones(48, 96)}, config_json(TINY) | {"eagle_config": {}})
    with pytest.raises(CheckpointError, match="weights take 18432 bytes, 1000 are free"):
        drafters_of(str(heads), around, 1000)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (" ", "a name is empty"),
        ("nothing/here/at/all", "is no folder, no .gguf file and no hub name"),
        ("mtp", "multi-token prediction"),
        ("{tmp}/file.txt", "a file that is not .gguf"),
        ("{tmp}/absent.gguf", "is no folder, no .gguf file"),
        ("{tmp}", "config.json"),
    ],
)
def test_names_that_are_no_drafter(tmp_path, name, cause):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(CheckpointError, match=cause) as refused:
        find_drafters(name.format(tmp=tmp_path), None, TINY)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("draft_model: ")


def test_none_are_found_where_none_are_named():
    assert find_drafters("", None, TINY) == ()


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"eagle_config": {}, "hidden_size": 64}, "hidden_size = 64, this one has 48"),
        ({"speculators_model_type": "mtp"}, "no multi-token prediction head is there"),
        ({"medusa_num_heads": 3, "vocab_size": 9}, "vocab_size = 9, the model has 300: take heads"),
        (DFLASH | {"num_target_layers": 7}, "is for a model of 7 layers, this one has 2"),
        ({"pard_token": 300}, "pard_token = 300, but the model knows 300"),
        ({"speculators_model_type": "mlp"}, "'mlp' is not supported"),
        ({"architectures": ["RWKV"]}, "'RWKV'. is not supported"),
    ],
)
def test_drafters_of_another_target_are_refused_by_their_headers(tmp_path, fields, cause):
    """There is no target yet, but for its shape."""
    made = folder(tmp_path, "draft", **fields)
    with pytest.raises(CheckpointError, match=cause) as refused:
        find_drafters(str(made), None, TINY)
    assert str(refused.value).startswith("draft_model: ")
    assert "name another there, or none" in str(refused.value)
