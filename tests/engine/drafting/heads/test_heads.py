"""The arithmetic of EAGLE, EAGLE-3 and multi-token prediction heads, and of their trees, against definitions
in plain torch; under every published name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.checkpoint import CheckpointKind
from engine.drafting.heads import eagle, mtp
from engine.drafting.heads.heads import Eagle3Head
from engine.drafting.standing import Standing
from engine.models.config import Experts
from tests.engine.drafting.heads.head_checks import (
    FREE_BYTES,
    Definition,
    assert_defined,
    guess,
    show,
    written,
)
from tests.engine.drafting.heads.head_definitions import (
    HIDDEN,
    LLAMA,
    Numbers,
    eagle3_tensors,
    eagle_tensors,
    mtp_tensors,
)
from tests.engine.drafting.heads.targets import sequence, surroundings
from tests.engine.tiny import TINY, random_weights

TOKENS = [5, 77, 31, 200, 13, 8, 299, 41, 5, 77, 120, 64]
IDS = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}


@pytest.fixture(scope="module")
def around():
    return surroundings()


def target_with(around, tmp_path, tensors):
    """The target, whose folder has these tensors beside others."""
    folder, _ = written(tmp_path / "target", tensors | {"model.norm.weight": torch.ones(4)}, **LLAMA)
    return replace(around, checkpoint=SimpleNamespace(path=folder, kind=CheckpointKind.FOLDER))


def loaded(folder, config, around):
    drafter = eagle.find(folder, config, around.model.config)(around, FREE_BYTES)
    drafter.cost = 0.0  # a tree is as deep as it may be
    return drafter


def assert_right(drafter, kind, tensors, config, around, window=512):
    """Guesses for two sequences at once, one of which grew by accepted drafts."""
    definition = Definition(kind, tensors, config, around.model, window)
    first = sequence(TOKENS, 1, temperature=0.0)
    second = sequence(TOKENS[3:9], 2, temperature=0.0)
    show(drafter, around.model, first)
    show(drafter, around.model, second)
    guess(drafter, first, second)
    assert assert_defined(drafter, definition, first) > 8
    assert assert_defined(drafter, definition, second) > 8
    drafter.standing = Standing()  # else it has learned that nothing stands
    first.tokens += [17, 18, 19]
    show(drafter, around.model, first, start=len(TOKENS) - 1)
    guess(drafter, first)
    assert assert_defined(drafter, definition, first) > 8


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (eagle_tensors(), {}),
        (eagle_tensors(bias=False), {"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle"}),
        (eagle_tensors(layers=2, norms=True), {"num_hidden_layers": 2, "add_para_norm": True}),
    ],
)
def test_eagle(made, config, around, tmp_path):
    folder, config = written(tmp_path, made, **LLAMA | config)
    drafter = loaded(folder, config, around)
    assert eagle.is_eagle(folder)
    assert drafter.taps == (-1,)
    assert_right(drafter, "eagle", made, config, around)


def test_eagle_as_speculators_writes_it(around, tmp_path):
    made = eagle_tensors()
    renamed = {
        name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): value
        for name, value in made.items()
    }
    config = {"speculators_model_type": "eagle", "fusion_bias": True, "layernorms": False}
    folder, config = written(tmp_path, renamed, **config, transformer_layer_config=LLAMA)
    assert_right(loaded(folder, config, around), "eagle", made, config, around)


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (eagle3_tensors(), IDS),
        (eagle3_tensors(known=90), IDS | {"draft_vocab_size": 90, "norm_before_residual": True}),
        (eagle3_tensors(embedding=True, qk=True), IDS | {"architectures": ["LlamaForCausalLMEagle3"]}),
        (eagle3_tensors(norms="one"), IDS | {"norm_before_fc": True}),
        (eagle3_tensors(norms="each"), IDS | {"fc_norm": True, "norm_output": True}),
        (eagle3_tensors(taps=2), {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}),
    ],
)
def test_eagle3(made, config, around, tmp_path):
    folder, config = written(tmp_path, made, **LLAMA | config)
    drafter = loaded(folder, config, around)
    assert eagle.is_eagle(folder)
    assert drafter.taps == ((1, 2) if "eagle_config" in config else (0, 1, 2))
    assert_right(drafter, "eagle3", made, config, around)


def test_eagle3_as_speculators_writes_it(around, tmp_path):
    made = eagle3_tensors(known=120)
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in made.items()}
    config = {"speculators_model_type": "eagle3", "norm_before_residual": False, "draft_vocab_size": 120}
    folder, config = written(tmp_path, renamed, **config, **IDS, transformer_layer_config=LLAMA)
    assert_right(loaded(folder, config, around), "eagle3", made, config, around)


def test_eagle3_of_two_layers_behind_windows(around, tmp_path):
    made = eagle3_tensors(layers=2)
    stored = {name.replace("midlayer.", "layers.0."): value for name, value in made.items()}
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2, "sliding_window": 5}
    config = {"speculators_model_type": "eagle3", "norm_before_residual": False}
    folder, config = written(tmp_path, stored, **config, **IDS, transformer_layer_config=LLAMA | kinds)
    assert_right(loaded(folder, config, around), "eagle3", made, config, around, window=5)


def test_embeddings_and_vocabulary_are_the_targets_where_there_are_no_others(around, tmp_path):
    made = eagle3_tensors(known=50)
    del made["lm_head.weight"]
    made["embed_tokens.weight"] = around.model.embedding.clone()
    folder, config = written(tmp_path, made, **LLAMA | IDS)
    head = loaded(folder, config, around).head
    assert isinstance(head, Eagle3Head)
    assert head.embedding is around.model.embedding
    assert torch.equal(head.head, around.model.head[head.known])


def deepseek(tensors, _config):
    own = {f"model.layers.2.{name}": value for name, value in tensors.items()}
    shared = {"shared_head.head.weight": torch.zeros(4, 4), "embed_tokens.weight": torch.zeros(4, 4)}
    return own | {f"model.layers.2.{name}": value for name, value in shared.items()}


MIMO = {
    "enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj",
    "shared_head.norm": "final_layernorm",
}  # fmt: skip
QWEN = {
    "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc",
    "shared_head.norm": "norm",
}  # fmt: skip


def renamed(tensors, names, base, layer):
    found = {}
    for name, value in tensors.items():
        role = name.removesuffix(".weight")
        found[f"{base}{names[role]}.weight" if role in names else f"{layer}{name}"] = value
    return found


def mimo(tensors, _config):
    """Features come first there."""
    fuse = torch.cat(tensors["eh_proj.weight"].chunk(2, 1)[::-1], 1)
    return renamed(tensors | {"eh_proj.weight": fuse}, MIMO, *["model.mtp_layers.0."] * 2)


def qwen(tensors, _config):
    return renamed(tensors, QWEN, "mtp.", "mtp.layers.0.")


@pytest.mark.parametrize("spell", [deepseek, mimo, qwen])
def test_mtp(spell, around, tmp_path):
    made = mtp_tensors()
    target = target_with(around, tmp_path, spell(made, None))
    drafter = mtp.find_own(target.checkpoint, target.model.config)(target, FREE_BYTES)
    drafter.cost = 0.0
    assert_right(drafter, "mtp", made, {}, target)


def test_mtp_as_speculators_writes_it(around, tmp_path):
    made = mtp_tensors()
    stored = renamed(made, MIMO, *["mtp_layers.0."] * 2)
    folder, config = written(tmp_path, stored, speculators_model_type="mtp", transformer_layer_config=LLAMA)
    drafter = mtp.find(folder, config, around.model.config)(around, FREE_BYTES)
    drafter.cost = 0.0
    assert_right(drafter, "mtp", made, {}, around)


def expert_target():
    """A target whose layers have four experts."""
    config = replace(
        TINY,
        architecture="qwen3_moe",
        experts=Experts(count=4, per_token=2, intermediate_size=24),
        layers=tuple(replace(layer, experts=True) for layer in TINY.layers),
    )
    numbers, weights = Numbers(7), random_weights(TINY)
    for index in range(config.num_layers):
        at = f"layers.{index}."
        del weights[f"{at}gate_up.weight"], weights[f"{at}down.weight"]
        weights[f"{at}router.weight"] = numbers(4, HIDDEN)
        weights[f"{at}experts.gate_up.weight"] = numbers(4, 48, HIDDEN)
        weights[f"{at}experts.down.weight"] = numbers(4, HIDDEN, 24)
    return surroundings(config, weights)


def test_mtp_with_experts(tmp_path):
    numbers = Numbers(8)
    made = {name: value for name, value in mtp_tensors().items() if not name.startswith("mlp.")}
    made["mlp.gate.weight"] = numbers(4, HIDDEN)
    for expert in range(4):
        at = f"mlp.experts.{expert}."
        made |= {f"{at}{name}_proj.weight": numbers(24, HIDDEN) for name in ("gate", "up")}
        made[f"{at}down_proj.weight"] = numbers(HIDDEN, 24)
    target = target_with(expert_target(), tmp_path, deepseek(made, None))
    drafter = mtp.find_own(target.checkpoint, target.model.config)(target, FREE_BYTES)
    drafter.cost = 0.0
    assert_right(drafter, "mtp", made, {}, target)


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "mtp"])
def test_in_halves(kind, tmp_path):
    """In the dtype of a target that is served in bfloat16."""
    around = surroundings(dtype=torch.bfloat16)
    if kind == "mtp":
        around = target_with(around, tmp_path, qwen(mtp_tensors(), None))
        drafter = mtp.find_own(around.checkpoint, around.model.config)(around, FREE_BYTES)
    else:
        made = eagle_tensors() if kind == "eagle" else eagle3_tensors(known=80, norms="each")
        drafter = loaded(*written(tmp_path, made, **LLAMA | IDS), around)
    one = sequence(TOKENS, 1, temperature=0.0)
    show(drafter, around.model, one)
    assert guess(drafter, one)[0].tokens
    assert drafter.kv.storage.pages.dtype is torch.bfloat16
