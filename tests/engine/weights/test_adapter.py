"""LoRA adapters against their definition, on every kind of base; what cannot be merged is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoint import Checkpoint, CheckpointError, locate
from engine.weights.adapter import WEIGHTS, Adapter
from engine.weights.checksum import weights_digest
from engine.weights.loader import load_weights
from tests.engine.weights.folder import folder_tensors, write_json
from tests.engine.weights.test_families import LLAMA
from tests.engine.weights.test_loader import tiny_gguf, write_model

CPU = torch.device("cpu")
UNTIED = LLAMA | {"tie_word_embeddings": False}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, torch.Tensor]:
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns) * 0.1,
        f"{stem}.lora_B.weight": torch.randn(rows, rank) * 0.1,
    }


def delta(tensors: dict[str, torch.Tensor], module: str, scale: float = 2.0) -> torch.Tensor:
    stem = f"base_model.model.{module}"
    return scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    write_json(path / "adapter_config.json", CONFIG | config)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    write_model(tmp_path, UNTIED)
    return locate(str(tmp_path))


def stored(checkpoint: Checkpoint, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    weights = load_weights(replace(checkpoint, adapter=adapter), torch.float32, CPU)
    return folder_tensors(checkpoint.transformer, weights)


def check(base: Checkpoint, adapter: Path, changed: dict[str, torch.Tensor]) -> None:
    """The weights of these modules became these, all others stayed."""
    before, after = stored(base), stored(base, adapter)
    for name, tensor in after.items():
        expected = changed.pop(name.removesuffix(".weight"), before[name])
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-6), name
        assert torch.equal(tensor, before[name]) == (expected is before[name])
    assert not changed


def test_products_are_added(base: Checkpoint, tmp_path: Path) -> None:
    before, tensors = stored(base), pair(Q, 64, 64) | pair(DOWN, 64, 96)
    changed = {module: before[f"{module}.weight"] + delta(tensors, module) for module in (Q, DOWN)}
    check(base, write_adapter(tmp_path, tensors), changed)


def test_ranks_and_scales_by_pattern_and_by_square_root(base: Checkpoint, tmp_path: Path) -> None:
    before, tensors = stored(base), pair(Q, 64, 64, 9) | pair(DOWN, 64, 96)
    config = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"^model.layers.1.mlp.down_proj": 6, "proj": 1}}
    changed = {
        Q: before[f"{Q}.weight"] + delta(tensors, Q, 8 / 3),
        DOWN: before[f"{DOWN}.weight"] + delta(tensors, DOWN, 3.0),
    }
    check(base, write_adapter(tmp_path, tensors, use_rslora=True, **config), changed)


def test_magnitudes(base: Checkpoint, tmp_path: Path) -> None:
    before, tensors = stored(base), pair(Q, 64, 64)
    tensors[f"base_model.model.{Q}.lora_magnitude_vector"] = torch.rand(64) + 0.5
    summed = before[f"{Q}.weight"] + delta(tensors, Q)
    lengths = tensors[f"base_model.model.{Q}.lora_magnitude_vector"] / summed.norm(dim=1)
    check(base, write_adapter(tmp_path, tensors, use_dora=True), {Q: summed * lengths[:, None]})


def test_embeddings_and_whole_modules(base: Checkpoint, tmp_path: Path) -> None:
    stem, whole = "base_model.model.model.embed_tokens", torch.randn(128, 64)
    tensors = {
        f"{stem}.lora_embedding_A": torch.randn(4, 128),
        f"{stem}.lora_embedding_B": torch.randn(64, 4),
    }
    product = (tensors[f"{stem}.lora_embedding_B"] @ tensors[f"{stem}.lora_embedding_A"]).T * 2
    changed = {"model.embed_tokens": stored(base)["model.embed_tokens.weight"] + product, "lm_head": whole}
    adapter = write_adapter(tmp_path, tensors | {"base_model.model.lm_head.weight": whole})
    check(base, adapter, dict(changed))
    # Embeddings that were saved along, as they were before the product.
    tensors[f"{stem}.base_layer.weight"] = torch.ones(128, 64)
    adapter = write_adapter(tmp_path, tensors | {"base_model.model.lm_head.modules_to_save.weight": whole})
    check(base, adapter, changed | {"model.embed_tokens": 1 + product})


def test_the_order_of_rows_in_gguf_files_is_not_the_adapters(tmp_path: Path) -> None:
    checkpoint, module = tiny_gguf(tmp_path), "model.layers.0.self_attn.k_proj"
    tensors = pair(module, 16, 32)
    adapter = write_adapter(tmp_path, tensors)
    before = load_weights(checkpoint, torch.float32, CPU)["layers.0.qkv.weight"]
    after = load_weights(replace(checkpoint, adapter=adapter), torch.float32, CPU)["layers.0.qkv.weight"]
    assert torch.allclose(after[32:48], before[32:48] + delta(tensors, module))
    assert torch.equal(after[:32], before[:32])
    assert torch.equal(after[48:], before[48:])


def test_the_sum_is_rounded_once(base: Checkpoint, tmp_path: Path) -> None:
    tensors = pair(Q, 64, 64)
    adapter = write_adapter(tmp_path, tensors)
    weights = load_weights(replace(base, adapter=adapter), torch.bfloat16, CPU)
    exact = stored(base)[f"{Q}.weight"].add(delta(tensors, Q, 1.0), alpha=2)
    assert torch.equal(weights["layers.0.qkv.weight"][:64], exact.bfloat16())


def test_pages_of_an_adapted_model_are_its_own(base: Checkpoint, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, pair(Q, 64, 64))

    def digest(adapter: Path | None) -> bytes:
        return weights_digest(load_weights(replace(base, adapter=adapter), torch.float32, CPU))

    first = digest(adapter)
    assert first != digest(None)
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    assert first == digest(adapter)
    write_adapter(tmp_path, {name: 2 * part for name, part in pair(Q, 64, 64).items()})
    assert first != digest(adapter)


def refusal(base: Checkpoint, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(replace(base, adapter=adapter), torch.float32, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 0}, "r = 0"),
        ({"rank_pattern": {"\n": None}}, "lacks rank_pattern"),
        ({"r": 5}, "no matrices of rank 5"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern = '(a+)+$'"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj"),
        ({"use_dora": True}, "has 0 magnitude vectors; DoRA is on"),
    ],
)
def test_settings_that_cannot_be_merged(
    base: Checkpoint, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    assert said in refusal(base, write_adapter(tmp_path, pair(Q, 64, 64), **config))


def test_every_tensor_has_its_place_or_is_named(base: Checkpoint, tmp_path: Path) -> None:
    good, stem = pair(Q, 64, 64), f"base_model.model.{Q}"
    norm = {"base_model.model.model.norm.weight": torch.ones(64)}
    for tensors, said in (
        (
            pair("model.layers.2.self_attn.q_proj", 64, 64),
            "layers.2.self_attn.q_proj.lora_A.weight' belongs to",
        ),
        (pair("vision_tower.layers.0.self_attn.q_proj", 64, 64), "belongs to no weight"),
        (pair(Q, 64, 32), "[4, 32] and [64, 4] do not fit a weight of [64, 64]"),
        (pair(Q, 64, 64) | {f"{stem}.lora_B.weight": torch.ones(64, 3)}, "no matrices of rank 4"),
        (pair(Q, 64, 64) | {f"{stem}.lora_B.bias": torch.ones(64)}, "lora_B.bias' is none of"),
        (good | {f"{stem}.lora_magnitude_vector": torch.ones(64)}, "1 magnitude vectors; DoRA is off"),
        (good | {f"{stem}.weight": torch.ones(64, 64)}, f"'{stem}.weight' is none of"),
        (good | pair(f"language_model.{Q}", 64, 64), "second one for its module"),
        ({f"{stem}.lora_A.weight": torch.ones(4, 64)}, "without its other half"),
        ({f"{stem}.lora_B.weight": torch.ones(64, 4)}, "none of a supported LoRA adapter"),
        ({name: tensor.int() for name, tensor in good.items()}, "has the type I32"),
        (norm, "norm.weight' belongs to no weight of the model that can be adapted"),
        ({"base_model.model.lm_head.weight": torch.ones(130, 64)}, "[130, 64] do not fit"),
        ({}, f"{WEIGHTS}: changes nothing"),
    ):
        assert said in refusal(base, write_adapter(tmp_path, tensors)), said


def test_a_shared_embedding_is_not_changed_on_one_side_only(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    tensors = {"base_model.model.model.embed_tokens.weight": torch.ones(128, 64)}
    said = refusal(locate(str(tmp_path)), write_adapter(tmp_path, tensors))
    assert "changes the embedding, which this model shares with its head" in said


def test_folders_that_are_none(base: Checkpoint, tmp_path: Path) -> None:
    assert "no folder of a LoRA adapter" in refusal(base, tmp_path / "gone")
    assert "adapter_config.json: No such file" in refusal(base, tmp_path)
    adapter = write_adapter(tmp_path, pair(Q, 64, 64))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.safetensors is missing (adapter_model.bin is pickled" in refusal(base, adapter)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([1])
JSON |= st.dictionaries(st.text(max_size=6), st.integers() | st.none(), max_size=2)
NAMES = ["r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora", "bias", "peft_type"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_settings_are_read_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    adapter = write_adapter(tmp_path, pair(Q, 64, 64))
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | values))
    try:
        Adapter(adapter)
    except CheckpointError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said
