"""What is wrong with a head's checkpoint is said in one line that names it, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.checkpoint import CheckpointKind
from engine.drafting.heads import eagle, mtp
from engine.drafting.heads.eagle_config import read_taps
from engine.weights.errors import CheckpointError
from tests.engine.drafting.heads.head_checks import FREE_BYTES, written
from tests.engine.drafting.heads.head_definitions import (
    HIDDEN,
    LLAMA,
    VOCAB,
    eagle3_tensors,
    eagle_tensors,
    mtp_tensors,
)
from tests.engine.drafting.heads.targets import surroundings

IDS = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}


@pytest.fixture(scope="module")
def around():
    return surroundings()


def load(module, folder, config, around, free_bytes=FREE_BYTES):
    return module.find(folder, config, around.model.config)(around, free_bytes)


def load_own(around, free_bytes=FREE_BYTES):
    return mtp.find_own(around.checkpoint, around.model.config)(around, free_bytes)


def complaint_of(load, *args):
    with pytest.raises(CheckpointError) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"hidden_size": 64}, "hidden_size = 64, this one has 48"),
        ({"vocab_size": 32000}, "vocab_size = 32000, this one has 300"),
        ({"target_hidden_size": 96}, "hidden_size = 96"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type = 'spiral'"),
        ({"num_hidden_layers": 2}, "2 layers, but 'midlayer.' is only one"),
        ({"intermediate_size": 77}, "midlayer.mlp.gate_proj.weight' has shape [40, 48]"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, "[0, 1, 3] is not supported: the model has 2"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, "'fc.weight' has shape [48, 144]"),
        ({"eagle_aux_hidden_state_layer_ids": ["all"]}, "eagle_aux_hidden_state_layer_ids = ['all']"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "of 2 layers there are none of the usual ones"),
        ({"eagle_config": {"use_last_layernorm": False}}, "eagle_config.use_last_layernorm = False"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "eagle_config.parallel_draft_step = 4"),
        ({"eagle_config": [1]}, "eagle_config = [1]"),
        (
            {"hidden_size": 32, "target_hidden_size": 48, "eagle_config": {"use_aux_hidden_state": False}},
            "a head of size 32 cannot read hidden states of size 48",
        ),
        ({"norm_before_fc": True}, "tensor 'input_norm.weight' is missing"),
        ({"fc_norm": True}, "tensor 'fc_norm.0.weight' is missing"),
        ({"norm_output": "yes"}, "norm_output = 'yes'"),
    ],
)
def test_configurations_of_eagle3_that_do_not_fit(config, complaint, around, tmp_path):
    folder, config = written(tmp_path, eagle3_tensors(), **LLAMA | IDS | config)
    said = complaint_of(load, eagle, folder, config, around)
    assert complaint in said
    assert str(folder) in said


def shifts(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"midlayer.self_attn.k_proj.weight": None}, "'midlayer.self_attn.k_proj.weight' is missing"),
        ({"norm.weight": None}, "tensor 'norm.weight' is missing"),
        ({"lm_head.weight": torch.zeros(9, HIDDEN)}, "'lm_head.weight' has shape [9, 48]"),
        ({"embed_tokens.weight": torch.zeros(VOCAB, 8)}, "'embed_tokens.weight' has shape [300, 8]"),
        ({"midlayer.mlp.router.weight": torch.zeros(2)}, "'midlayer.mlp.router.weight' has no place"),
        ({"d2t": shifts(0, 1, 1), "lm_head.weight": torch.zeros(3, HIDDEN)}, None),
        ({"d2t": shifts(0, -1)}, "'d2t' leads to a token twice"),
        ({"d2t": shifts(0, 299)}, "outside the vocabulary of 300"),
        ({"d2t": shifts(-1)}, "outside the vocabulary of 300"),
        ({"d2t": torch.zeros(3)}, "'d2t' is F32 [3]"),
        ({"d2t": torch.zeros(301, dtype=torch.int64)}, "'d2t' is I64 [301]"),
    ],
)
def test_tensors_of_eagle3_that_do_not_fit(change, complaint, around, tmp_path):
    made = {name: value for name, value in (eagle3_tensors() | change).items() if value is not None}
    folder, config = written(tmp_path, made, **LLAMA | IDS)
    if complaint is None:
        load(eagle, folder, config, around)
    else:
        assert complaint in complaint_of(load, eagle, folder, config, around)


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        ({"fc.weight": None}, {}, "tensor 'fc.weight' is missing"),
        ({"fc.bias": torch.zeros(3)}, {}, "'fc.bias' has shape [3]"),
        ({"layers.0.self_attn.k_proj.bias": None}, {}, "'layers.0.self_attn.k_proj.bias' is missing"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(1)}, {}, "'layers.1.mlp.up_proj.weight' has no place"),
        ({}, {"layernorms": True}, "layernorms = True"),
        ({}, {"hidden_size": 32, "target_hidden_size": 48}, "a head of size 32 cannot read"),
        ({}, {"num_hidden_layers": 2}, "'layers.1."),
    ],
)
def test_eagle_that_does_not_fit(change, config, complaint, around, tmp_path):
    made = {name: value for name, value in (eagle_tensors() | change).items() if value is not None}
    folder, config = written(tmp_path, made, **LLAMA | config)
    assert complaint in complaint_of(load, eagle, folder, config, around)


def test_a_norm_that_nobody_uses_may_be_stored(around, tmp_path):
    made = eagle_tensors() | {"layers.0.input_layernorm.weight": torch.ones(HIDDEN)}
    folder, config = written(tmp_path, made, **LLAMA)
    assert load(eagle, folder, config, around).head.layers.weights[0].attention_norm is None


def test_a_pickled_head_is_never_opened(around, tmp_path):
    folder, config = written(tmp_path, {}, **LLAMA)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    for said in (complaint_of(load, eagle, folder, config, around, 1), complaint_of(eagle.is_eagle, folder)):
        assert "pytorch_model.bin is pickled" in said
        assert "convert it" in said


def test_without_room_for_its_kv(around, tmp_path):
    folder, config = written(tmp_path, eagle_tensors(), **LLAMA)
    assert "the KV of a draft model takes" in complaint_of(load, eagle, folder, config, around, 4096)


@pytest.mark.parametrize(
    ("num_layers", "ids", "taps"),
    [
        (32, {}, (2, 16, 29)),
        (36, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}}, (2, 18, 33)),
        (36, {"eagle_aux_hidden_state_layer_ids": [2, 18, 33]}, (2, 18, 33)),
        (36, {"eagle_aux_hidden_state_layer_ids": [18, 36, 2]}, (2, 18, 36)),
        (36, {"eagle_aux_hidden_state_layer_ids": []}, (2, 18, 33)),
        (36, {"eagle_config": {"use_aux_hidden_state": False}}, ()),
    ],
)
def test_which_hidden_states_are_meant(num_layers, ids, taps, tmp_path):
    """Of the same heads for GPT-OSS 120B, those of one project count inputs of layers, of another outputs."""
    assert read_taps(tmp_path, ids, num_layers) == taps


# Multi-token prediction


def in_target(around, folder, tensors):
    folder, _ = written(folder, {f"model.layers.2.{name}": value for name, value in tensors.items()}, **LLAMA)
    return replace(around, checkpoint=SimpleNamespace(path=folder, kind=CheckpointKind.FOLDER))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"eh_proj.weight": None}, "no multi-token prediction head is there"),
        ({"hnorm.weight": None}, "'model.layers.2.hnorm.weight' is missing"),
        ({"self_attn.kv_a_proj_with_mqa.weight": torch.zeros(4, 4)}, "is of latent attention"),
        ({"mlp.experts.0.gate_proj.weight": torch.zeros(4, 4)}, "of a model without experts"),
        ({"mlp.gate.e_score_correction_bias": torch.zeros(4)}, "e_score_correction_bias' has no place"),
        ({"self_attn.q_proj.bias": torch.zeros(64)}, "'model.layers.2.self_attn.q_proj.bias' has no place"),
        ({"self_attn.q_proj.weight": torch.zeros(128, HIDDEN)}, "has shape [128, 48]"),
    ],
)
def test_heads_in_the_target_that_do_not_fit(change, complaint, around, tmp_path):
    made = {name: value for name, value in (mtp_tensors() | change).items() if value is not None}
    said = complaint_of(load_own, in_target(around, tmp_path, made))
    assert complaint in said
    assert "draft without" in said or "tensor" in said


def test_where_there_are_no_heads(around):
    assert "none: draft without 'mtp'" in complaint_of(load_own, around)
    gguf = replace(around, checkpoint=SimpleNamespace(path="a.gguf", kind=CheckpointKind.GGUF))
    assert "a.gguf: multi-token" in complaint_of(load_own, gguf)


def test_heads_in_the_target_need_room(around, tmp_path):
    target = in_target(around, tmp_path, mtp_tensors())
    assert "bytes" in complaint_of(load_own, target, 10_000)


def test_a_head_of_another_model(around, tmp_path):
    config = {"transformer_layer_config": LLAMA | {"hidden_size": 96}}
    folder, config = written(tmp_path, mtp_tensors(), **config)
    assert "hidden_size = 96, the model has 48" in complaint_of(load, mtp, folder, config, around)
