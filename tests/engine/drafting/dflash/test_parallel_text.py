"""Medusa heads and block diffusion through the whole engine: never another text, and right guesses stand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from engine.drafting.dflash.drafter import find
from engine.drafting.dflash.layers import BlockLayers
from engine.drafting.heads.medusa import Medusa
from engine.drafting.heads.medusa_weights import Block, MedusaWeights
from engine.kv_storage import KVStorage
from engine.messages import Submit
from scheduler.plan import Slice, StepPlan
from tests.engine.drafting.dflash.dflash_folders import BASE, DSPARK, SECOND, tensors, written
from tests.engine.drafting.eager import eager
from tests.engine.drafting.heads.targets import CHAIN, NUM_WORDS, chain_head, chain_weights, following
from tests.engine.drafting.test_speculative_text import PROMPTS, SAMPLINGS, told
from tests.engine.tiny import CPU, SETTINGS, TINY, abort, core_around, request, run, tiny_core

FREE = 1 << 30
NUM_HEADS = 4


def medusa(around, vocabularies=None):
    hidden, generator = around.model.config.hidden_size, torch.Generator().manual_seed(3)
    spread = 0.3 if vocabularies is None else 0.0  # right heads leave what they see as it is
    blocks = [
        (Block(torch.randn(hidden, hidden, generator=generator) * spread, None),) for _ in range(NUM_HEADS)
    ]
    if vocabularies is None:
        rows = around.model.config.vocab_size
        vocabularies = [torch.randn(rows, hidden, generator=generator) * 0.3 for _ in range(NUM_HEADS)]
    return Medusa(MedusaWeights(tuple(blocks), tuple(vocabularies)), around)


def dflash(folder, config, around, found=None):
    made = written(folder, config, found or tensors(config))
    return find(made, config, around.model.config)(around, FREE)


def asked(method, names=("greedy", "warm", "hot"), **fields):
    """In one batch, of each sampling and prompt one; shorter than where drafters cost nothing."""
    fields = {"method": method, "max_tokens": 16, "logprobs": 2, **fields}
    return [
        request(f"{name} {number}", prompt, seed=number, **SAMPLINGS[name], **fields)
        for name, (number, prompt) in product(names, enumerate(PROMPTS))
    ]


MAKERS = {
    "medusa": lambda folder: lambda around: {"medusa": medusa(around)},
    "dflash": lambda folder: lambda around: {"dflash": dflash(folder, BASE, around)},
    "dflash-2": lambda folder: lambda around: {"dflash": dflash(folder, SECOND, around)},
    "dspark": lambda folder: lambda around: {"dflash": dflash(folder, DSPARK, around)},
}


def drafts_of(core):
    """What was verified is noted as (computed, stood) of each answer."""
    found = []
    learn = core.speculation.learn

    def noted(plan, outcomes):
        verified = learn(plan, outcomes)
        for entries in verified.values():
            found.extend((one.num_drafts, len(one.accepted)) for one in entries)
        return verified

    core.speculation.learn = noted
    return found


@pytest.fixture(scope="module")
def plain():
    return told(tiny_core(), asked("autoregressive"))


@pytest.mark.parametrize("name", MAKERS)
def test_random_weights_never_give_another_text(name, tmp_path, plain):
    core = eager(tiny_core(drafters=MAKERS[name](tmp_path)))
    drafter = "medusa" if name == "medusa" else "dflash"
    found = drafts_of(core)
    for _ in range(2):  # the second time prompts are found in the cache, and were not seen
        assert told(core, asked("speculative", drafter=drafter)) == plain
    assert sum(count for count, _ in found) > 150, "it was asked, and guessed"


@pytest.mark.parametrize("name", MAKERS)
def test_also_where_sequences_are_preempted_and_prompts_come_in_chunks(name, tmp_path):
    few = {"num_pages": 8, "max_num_batched_tokens": 24}
    drafter = "medusa" if name == "medusa" else "dflash"
    texts = []
    for method in ("autoregressive", "speculative"):
        core = eager(tiny_core(drafters=MAKERS[name](tmp_path), **few))
        wanted = [
            request(f"r{index}", prompt, method=method, drafter=drafter, max_tokens=36, **SAMPLINGS["hot"])
            for index, prompt in enumerate((PROMPTS[0], PROMPTS[0][3:], PROMPTS[1]))
        ]
        texts.append({key: one.tokens for key, one in run(core, *wanted).items()})
        assert core.scheduler.stats().num_preempted_for_pages
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["medusa", "dflash"])
def test_nothing_is_left_of_those_who_ended_or_were_aborted(name, tmp_path):
    core = eager(tiny_core(drafters=MAKERS[name](tmp_path)))
    run(core, *asked("speculative", ["greedy"], drafter=name))
    core.handle(Submit(request("a", PROMPTS[2], temperature=0.0, max_tokens=200, method="speculative")))
    for _ in range(6):
        core.step()
    drafter = core.speculation.drafters[name]
    assert getattr(drafter, "_states", None) or drafter.waiting._progress
    abort(core, "a")
    core.step()
    if name == "medusa":
        assert not drafter._states
    else:
        assert not drafter.waiting._progress
        assert drafter.kv.num_free_blocks == drafter.kv.num_blocks


def test_the_context_is_what_the_target_computes_of_the_text(tmp_path, monkeypatch):
    """Whoever drafted it, and however it was cut."""
    rows = []
    write = BlockLayers.write_context

    def noted(self, seen, *others):
        rows.append(seen.clone())
        return write(self, seen, *others)

    monkeypatch.setattr(BlockLayers, "write_context", noted)
    core = eager(tiny_core(drafters=MAKERS["dflash"](tmp_path), max_num_batched_tokens=16))
    found = drafts_of(core)
    ended = []
    release = core.speculation.release

    def kept(seq_id):
        ended.append(list(core.speculation._met[seq_id].tokens))
        release(seq_id)

    core.speculation.release = kept
    run(core, request("a", PROMPTS[0], temperature=0.0, max_tokens=60, method="speculative"))
    assert sum(stood for _, stood in found) > 2, "of drafts that stood there are rows as well"
    again = torch.cat(rows)
    model, tokens = core.runner.model, ended[0][: len(again)]
    storage = KVStorage(model.config, 64, 16, torch.float32, CPU)
    piece = Slice(99, 0, tuple(tokens), range(len(tokens)), 0, tuple(range(-(-len(tokens) // 16))), 0)
    batch = core.runner.batches.build(StepPlan(0, (piece,)))
    _, tapped = model.compute(batch, storage, core.speculation.drafters["dflash"].taps)
    expected = torch.cat([tap[: len(tokens)] for tap in tapped], dim=-1)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def chain_core(weights, make):
    return eager(core_around(CHAIN, weights, replace(SETTINGS, num_pages=64), drafters=make))


def steps_for(core, **fields):
    """-> the text, and the steps behind the prompt's"""
    before = core.scheduler._num_steps
    heard = run(core, request("a", [5], max_tokens=37, method="speculative", **fields), checked=False)
    return heard["a", 0].tokens, core.scheduler._num_steps - before - 1


def learnt(core, **fields):
    """Some drafts are needed to learn how well they stand."""
    for seed in range(3):
        steps_for(core, seed=seed, **fields)
    return core


def test_heads_that_are_right_are_accepted():
    heads = [chain_head(2 + head) for head in range(NUM_HEADS)]
    core = chain_core(chain_weights(), lambda around: {"medusa": medusa(around, heads)})
    tokens, steps = steps_for(core, temperature=0.0, drafter="medusa")
    assert tokens == [following(5, count) for count in range(1, 38)]
    assert steps == -(-36 // (NUM_HEADS + 1)), "each commits a token and all drafts"


SAMPLED = (
    {"temperature": 0.7},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1.5, "presence_penalty": 1.0},
)


def forgetful():
    """A target to which all texts are alike: its next word is drawn from the same odds everywhere."""
    weights = chain_weights()
    weights["embedding"].fill_(1.0)
    weights["head"] = torch.randn(weights["head"].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return weights


@pytest.mark.parametrize("sampling", SAMPLED)
def test_heads_that_know_the_odds_draw_what_the_target_draws(sampling):
    heads = [forgetful()["head"]] * NUM_HEADS
    core = chain_core(forgetful(), lambda around: {"medusa": medusa(around, heads)})
    tokens, steps = steps_for(
        learnt(core, drafter="medusa", **sampling), drafter="medusa", seed=7, **sampling
    )
    assert len(set(tokens)) > 10, "it is a draw"
    assert steps == -(-36 // (NUM_HEADS + 1))


def small(config):
    """A drafter's configuration for a chain's target."""
    sizes = {"hidden_size": CHAIN.hidden_size, "vocab_size": NUM_WORDS, "num_target_layers": 3}
    ids = {"mask_token_id": 0, "target_layer_ids": [0]}
    return config | sizes | ids | {"dflash_config": None, "num_hidden_layers": 1, "layer_types": None}


def silent(config, hidden=CHAIN.hidden_size):
    """Its layers add nothing."""
    found = {
        "fc.weight": torch.zeros(hidden, hidden),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
    }
    for name, value in tensors(BASE).items():
        if name.startswith("layers.0."):
            shape = [
                hidden if (size == TINY.hidden_size and axis == 1) or ("down" in name and axis == 0) else size
                for axis, size in enumerate(value.shape)
            ]
            found[name] = torch.zeros(shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"layers.0.{name}.weight"] = torch.ones(hidden)
    found["layers.0.self_attn.o_proj.weight"] = torch.zeros(hidden, 4 * 12)
    return found


@pytest.mark.parametrize("sampling", SAMPLED)
def test_blocks_that_know_the_odds_draw_what_the_target_draws(sampling, tmp_path):
    config = small(BASE)
    make = lambda around: {"dflash": dflash(tmp_path, config, around, silent(config))}  # noqa: E731
    core = learnt(chain_core(forgetful(), make), drafter="dflash", **sampling)
    tokens, steps = steps_for(core, drafter="dflash", seed=7, **sampling)
    assert len(set(tokens)) > 10
    assert steps == -(-36 // 6), "five drafts and one token each"


def test_a_markov_head_that_is_right_is_accepted(tmp_path):
    config = small(DSPARK) | {"markov_rank": NUM_WORDS}
    found = silent(config) | {
        "markov_head.markov_w1.weight": torch.eye(NUM_WORDS),
        "markov_head.markov_w2.weight": chain_head(1)[:, :NUM_WORDS] * 50,
    }
    core = chain_core(chain_weights(), lambda around: {"dflash": dflash(tmp_path, config, around, found)})
    tokens, steps = steps_for(core, temperature=0.0, drafter="dflash")
    assert tokens == [following(5, count) for count in range(1, 38)]
    assert steps == -(-36 // 7), "six drafts and one token each"
