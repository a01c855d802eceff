"""What a file holds and the configuration does not ask for is used, refused or named; never dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import locate
from engine.weights.folder_source import folder_source
from engine.weights.mapped import MappedFiles
from engine.weights.safetensors import INDEX
from tests.engine.families.served import serve
from tests.engine.weights.folder import write_json
from tests.engine.weights.test_families import LLAMA
from tests.engine.weights.test_loader import UNTIED, load, refusal, tiny_gguf, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD, LAYER = "lm_head.weight", "model.layers.0."


def changed(folder: Path, config: dict[str, Any], more: dict[str, torch.Tensor], without: str = "") -> None:
    """Tensors added to those of the folder, under this configuration."""
    tensors = load_file(folder / "model.safetensors") | more
    tensors.pop(without, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def texts(folder: Path) -> list[Any]:
    """A text as it is served, and every logit on the way."""
    (text,) = serve(folder, [[1, 2, 3, 4, 5]], step_tokens=64, num_tokens=6)
    return [text.tokens, text.logits.tolist()]


@pytest.mark.parametrize(
    "denied",
    [{"tie_word_embeddings": True}, {"attention_bias": False}, {"mlp_bias": False}],
    ids=lambda denied: next(iter(denied)),
)
def test_what_the_configuration_denies_and_the_file_has_is_used(
    tmp_path: Path, denied: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """The head was dropped without a word, and all log-probabilities were wrong."""
    model = write_model(tmp_path, UNTIED)
    biases = {
        name: torch.randn_like(value) for name, value in model.state_dict().items() if name.endswith("bias")
    }
    changed(tmp_path, UNTIED, biases)
    expected = texts(tmp_path)
    assert not caplog.text
    write_json(tmp_path / "config.json", UNTIED | denied)
    assert texts(tmp_path) == expected
    assert caplog.text.count("WARNING") == (2 if "attention_bias" in denied else 1)
    assert "lm_head.weight" in caplog.text or "bias" in caplog.text


def test_what_a_file_says_twice_is_read_once_and_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedding = write_model(tmp_path, LLAMA).state_dict()["model.embed_tokens.weight"]
    changed(tmp_path, LLAMA, {HEAD: embedding.clone()})
    assert "head" not in load(locate(str(tmp_path)))
    assert not caplog.text


def test_a_head_of_another_type_than_the_embeddings_is_kept(tmp_path: Path) -> None:
    embedding = write_model(tmp_path, LLAMA).state_dict()["model.embed_tokens.weight"]
    changed(tmp_path, LLAMA, {HEAD: embedding.bfloat16()})
    assert torch.equal(load(locate(str(tmp_path)))["head"], embedding.bfloat16().float())


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    changed(tmp_path, LLAMA, {HEAD: torch.ones(9, 64)})
    assert f"'{HEAD}' has shape [9, 64]" in refusal(locate(str(tmp_path)))


def test_missing_embeddings_are_named_whatever_the_head(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    changed(tmp_path, LLAMA, {HEAD: torch.ones(128, 64)}, without="model.embed_tokens.weight")
    assert "'model.embed_tokens.weight' is missing" in refusal(locate(str(tmp_path)))


def test_a_missing_head_is_the_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path, LLAMA)
    expected = texts(tmp_path)
    write_json(tmp_path / "config.json", LLAMA | {"tie_word_embeddings": False})
    assert texts(tmp_path) == expected
    assert f"no tensor '{HEAD}': the embeddings serve as the head" in caplog.text


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        (f"{LAYER}self_attn.q_norm.weight", (8,), "a llama has no place for it"),
        (f"{LAYER}pre_feedforward_layernorm.weight", (64,), "a llama has no place for it"),
        (f"{LAYER}self_attn.sinks", (8,), "a llama has no place for it"),
        (f"{LAYER}mlp.experts.0.up_proj.weight", (2, 2), "a llama has no place for it"),
        ("model.layers.1.self_attn.q_proj.bias", (64,), "a llama has no place for it"),  # of one layer only
        ("model.layers.2.mlp.up_proj.weight", (96, 64), "a layer beyond the 2 of the configuration"),
        ("model.norm.bias", (64,), "a llama has no place for it"),
        ("model.embed_positions.weight", (64, 64), "a llama has no place for it"),
        ("lm_head.bias", (128,), "a llama has no place for it"),
    ],
)
def test_what_would_change_the_answer_and_has_no_place_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], why: str
) -> None:
    write_model(tmp_path, LLAMA)
    changed(tmp_path, LLAMA, {name: torch.ones(shape)})
    said = refusal(locate(str(tmp_path)))
    assert f"tensor '{name}'" in said
    assert why in said
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LAYER}self_attn.rotary_emb.inv_freq", torch.ones(4)),
        (f"{LAYER}self_attn.masked_bias", torch.ones(())),
        (f"{LAYER}self_attn.bias", torch.ones(4, 4)),
        (f"{LAYER}self_attn.q_proj.bias", torch.zeros(64)),  # as GPTQ's tools write it
        (f"{LAYER}self_attn.o_proj.bias", torch.zeros(64)),
        ("lm_head.bias", torch.zeros(128)),
        ("vision_tower.encoder.weight", torch.ones(4)),
        ("model.vision_tower.encoder.weight", torch.ones(4)),
        ("model.multi_modal_projector.weight", torch.ones(4)),
        ("visual.blocks.0.attn.qkv.weight", torch.ones(4)),
        ("model.mtp_layers.0.input_proj.weight", torch.ones(4)),
        ("mtp.fc.weight", torch.ones(4)),
    ],
)
def test_what_is_of_no_use_is_passed_over_in_silence(
    tmp_path: Path, name: str, value: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, LLAMA)
    expected = load(locate(str(tmp_path)))
    changed(tmp_path, LLAMA, {name: value})
    found = load(locate(str(tmp_path)))
    assert found.keys() == expected.keys()
    assert not caplog.text


def test_a_layer_that_only_drafts_may_lie_behind_the_last(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    behind = {f"model.layers.2.{name}.weight": torch.ones(4) for name in ("eh_proj", "enorm", "mlp.up_proj")}
    changed(tmp_path, LLAMA, behind)
    load(locate(str(tmp_path)))


def test_what_lies_beside_the_model_is_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, LLAMA)
    changed(tmp_path, LLAMA, {f"v_head.{part}.weight": torch.ones(3) for part in "abcde"})
    load(locate(str(tmp_path)))
    (line,) = caplog.messages
    assert "not read, as they lie beside the model: 'v_head.a.weight', " in line
    assert line.endswith("5 tensors in all")


def test_gguf_files_are_read_whole_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = load(tiny_gguf(tmp_path, {"output.weight": (4, 32)}))
    assert own["head"].shape == (4, 32)
    assert load(tiny_gguf(tmp_path, {"v.blk.0.ffn_up.weight": (4,)}))
    assert not caplog.text
    for name in ("blk.0.attn_q_norm.weight", "blk.1.ffn_up.weight", "output.bias", "position_embd.weight"):
        assert f"tensor '{name}'" in refusal(tiny_gguf(tmp_path, {name: (8,)}))


def test_a_bias_is_looked_at_without_opening_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large GPTQ model hundreds are looked at, and each time all of its files were opened."""
    files = {"a.safetensors": "a.weight", "b.safetensors": "b.bias"}
    for file, name in files.items():
        save_file({name: torch.zeros(4)}, tmp_path / file)
    write_json(tmp_path / INDEX, {"weight_map": {name: file for file, name in files.items()}})
    write_json(tmp_path / "config.json", {})
    source = folder_source(tmp_path)
    for name in files.values():
        source.recipe(name)
    opened: list[str] = []
    monkeypatch.setattr(MappedFiles, "_map", _noting(opened, MappedFiles._map))
    assert source.is_zero("b.bias")
    assert opened == ["b.safetensors"]


def _noting(opened: list[str], map_file: Callable[[MappedFiles, Path], None]) -> Callable[..., None]:
    def mapped(self: MappedFiles, path: Path) -> None:
        opened.append(path.name)
        map_file(self, path)

    return mapped
