"""Heads at work in the engine: features and tokens stay aligned whatever happens to a sequence, texts are
those of plain decoding, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cuda_kernels.reference_attention import KEY_BLOCK
from engine.checkpoint import locate
from engine.drafting.draft_kv import TREE_SLOTS, DraftKV
from engine.drafting.guess import CATCHING_UP, NO_GUESS, Seen, Want
from engine.drafting.heads import catching_up, eagle, mtp
from engine.drafting.heads.head_drafter import HeadDrafter
from engine.drafting.heads.waiting_features import WaitingFeatures
from engine.drafting.kinds import NUM_CHANCES, NUM_KINDS
from engine.messages import Submit
from engine.weights.loader import load_weights
from tests.engine.drafting.eager import eager
from tests.engine.drafting.heads.head_checks import (
    FREE_BYTES,
    Definition,
    assert_defined,
    guess,
    show,
    true_features,
    written,
)
from tests.engine.drafting.heads.head_definitions import (
    LLAMA,
    Numbers,
    eagle3_tensors,
    eagle_tensors,
    mtp_tensors,
)
from tests.engine.drafting.heads.targets import (
    CHAIN,
    chain_weights,
    knowing_head,
    sequence,
    surroundings,
)
from tests.engine.drafting.models.small import paths
from tests.engine.drafting.test_speculative_text import PROMPTS, SAMPLINGS
from tests.engine.tiny import (
    CPU,
    SETTINGS,
    TINY,
    abort,
    core_around,
    random_weights,
    request,
    run,
    tiny_core,
)
from tests.engine.weights.folder import config_json, folder_tensors

MADE = {
    "eagle": (eagle_tensors(), {}),
    "eagle3": (eagle3_tensors(known=200), {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}),
    "mtp": (mtp_tensors(), {}),
}
MIMO = {
    "enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj",
    "shared_head.norm": "final_layernorm",
}  # fmt: skip


class Checked:
    """Some of a drafter's guesses are held against the definition with the target's true hidden states."""

    def __init__(self, drafter, definition):
        self.drafter = drafter
        self.taps = drafter.taps
        self.definition = definition
        self.num_guesses = self.num_checked = self.num_kept = 0
        self.release = drafter.release

    def observe(self, seen):
        self.num_kept += sum(len(one.kept) for one in seen)
        self.drafter.observe(seen)

    def guess(self, wants):
        guesses = self.drafter.guess(wants)
        for want, found in zip(wants, guesses, strict=True):
            self.num_guesses += 1
            paths(found)
            assert len(found.tokens) <= want.limit
            if found.tokens and self.num_guesses % 5 == 1:
                self.num_checked += 1
                assert_defined(self.drafter, self.definition, want.sequence, num_parents=3)
        return guesses


def checked_core(kind, folder, **settings):
    """-> a core that always asks its head, and that head's drafter"""
    tensors, config = MADE[kind]
    roles = {name: name.removesuffix(".weight") for name in tensors} if kind == "mtp" else {}
    renamed = {name: f"mtp_layers.0.{MIMO.get(role, role)}.weight" for name, role in roles.items()}
    stored = {renamed.get(name, name): value for name, value in tensors.items()}
    folder, config = written(folder, stored, **LLAMA | config)
    found = []

    def drafters(around):
        module = mtp if kind == "mtp" else eagle
        drafter = module.find(folder, config, around.model.config)(around, FREE_BYTES)
        drafter.cost = 0.02
        found.append(Checked(drafter, Definition(kind, tensors, config, around.model)))
        return {kind: found[0]}

    return eager(tiny_core(drafters=drafters, **settings)), found[0]


def asked(sampling, **fields):
    return [
        request(f"r{number}", prompt, max_tokens=16, logprobs=1, seed=number, **sampling, **fields)
        for number, prompt in enumerate([PROMPTS[0], PROMPTS[0][:20], PROMPTS[2]])
    ]


def told(core, requests, **how):
    heard = run(core, *requests, **how)
    return {key: (one.tokens, one.logprobs, one.finish) for key, one in heard.items()}


@pytest.fixture(scope="module")
def plain():
    core = tiny_core()
    return {name: told(core, asked(sampling)) for name, sampling in SAMPLINGS.items()}


def drafted(kind, name):
    return asked(SAMPLINGS[name], method="speculative", drafter=kind)


def assert_empty(checked):
    drafter = checked.drafter
    assert not drafter.waiting._progress
    assert not drafter._trees
    assert not drafter.kv._held
    assert drafter.kv.num_free_blocks == drafter.kv.num_blocks


@pytest.mark.parametrize(("kind", "name"), [("eagle", "greedy"), ("eagle3", "hot"), ("mtp", "penalised")])
def test_random_heads_cost_speed_only_and_read_what_the_target_computed(kind, name, plain, tmp_path):
    """The second time the prompts are found in the cache, and drafts of others stand."""
    core, checked = checked_core(kind, tmp_path)
    assert told(core, drafted(kind, name)) == plain[name]
    assert told(core, drafted("auto", name)) == plain[name]
    assert checked.num_checked > 5
    assert checked.num_kept > 20
    assert_empty(checked)


def test_also_through_preemption_and_chunked_prompts(tmp_path):
    def asked(**fields):
        prompts = [[7 * number + 3 + k for k in range(5 + number)] for number in range(4)]
        fields = {"max_tokens": 44, "logprobs": 1, **SAMPLINGS["hot"], **fields}
        return [request(f"r{seed}", prompt, seed=seed, **fields) for seed, prompt in enumerate(prompts)]

    expected = told(tiny_core(), asked())
    core, checked = checked_core("eagle3", tmp_path, num_pages=8, max_num_batched_tokens=12)
    for drafter in ("eagle3", "auto"):
        found = told(core, asked(method="speculative", drafter=drafter))
        assert found == expected
    assert core.scheduler.stats().num_preemptions
    assert checked.num_checked > 5
    assert checked.num_kept > 20
    assert_empty(checked)


def test_an_aborted_request_leaves_nothing_behind(tmp_path):
    core, checked = checked_core("mtp", tmp_path)
    core.handle(Submit(request("a", PROMPTS[0], max_tokens=200, method="speculative", drafter="mtp")))
    for _ in range(12):
        core.step()
    assert checked.drafter.kv._held
    abort(core, "a")
    core.step()
    assert_empty(checked)


def test_a_target_that_brings_its_head_along(tmp_path):
    """MiMo's checkpoint: a Qwen2 whose queries, keys and values have biases, and beside it one head."""
    config = replace(TINY, architecture="qwen2", qkv_bias=True)
    numbers, weights = Numbers(5), random_weights(TINY)
    weights |= {f"layers.{index}.qkv.bias": numbers(128) for index in range(config.num_layers)}
    biases = {name: value for name, value in numbers.layer("", biases=True).items() if name.endswith("bias")}
    made = mtp_tensors() | biases
    own = {name.removesuffix(".weight"): name for name in made if name.endswith(".weight")}
    stored = {f"model.mtp_layers.0.{MIMO.get(role, role)}.weight": made[name] for role, name in own.items()}
    stored |= {f"model.mtp_layers.0.{name}": value for name, value in biases.items()}
    fuse = "model.mtp_layers.0.input_proj.weight"
    stored[fuse] = torch.cat(stored[fuse].chunk(2, 1)[::-1], 1)  # features come first there
    mimo = config_json(config) | {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    written(tmp_path, folder_tensors(config, weights) | stored, **mimo, num_nextn_predict_layers=1)
    checkpoint = locate(str(tmp_path))
    assert checkpoint.transformer.qkv_bias
    loaded = load_weights(checkpoint, torch.float32, CPU)

    def drafters(around):
        drafter = mtp.find_own(checkpoint, around.model.config)(around, FREE_BYTES)
        return {"mtp": Checked(drafter, Definition("mtp", made, {}, around.model))}

    core = core_around(checkpoint.transformer, loaded, SETTINGS, drafters=drafters)
    expected = told(core, asked(SAMPLINGS["warm"]))
    eager(core)
    assert told(core, drafted("mtp", "warm")) == expected
    assert core.speculation.drafters["mtp"].num_checked > 2


# A chain's target knows the next word by the last one alone, and its hidden states are those words.


@pytest.mark.parametrize(
    ("from_token", "sureness", "sampling"),
    [
        (False, 4.0, {"temperature": 0.0}),
        (True, 4.0, {"temperature": 0.0}),
        (True, 0.5, {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.3, "seed": 3}),
    ],
)
def test_a_head_that_knows_the_target_is_right_at_any_temperature(from_token, sureness, sampling):
    def drafters(around):
        head = knowing_head(around, from_token)
        return {"eagle": HeadDrafter(head, DraftKV.beside(around, head.config, FREE_BYTES), around, 0.01)}

    fields = {"max_tokens": 80, **sampling}
    core = core_around(CHAIN, chain_weights(sureness), SETTINGS, drafters=drafters)
    expected = run(core, request("plain", [1, 2, 3], **fields))["plain", 0].tokens
    eager(core)
    before = core.scheduler._num_steps
    found = run(core, request("b", [1, 2, 3], method="speculative", drafter="eagle", **fields))["b", 0].tokens
    assert found == expected
    assert len(set(found)) > 5, "a text that says something"
    assert core.scheduler._num_steps - before < 80 / 4
    standing = core.speculation.drafters["eagle"].standing
    firsts = [kind for kind in standing._seen if kind % NUM_KINDS < NUM_CHANCES]
    assert [standing._stood[kind] for kind in firsts] == [standing._seen[kind] for kind in firsts]


# What happens to a sequence


@pytest.fixture
def small(tmp_path):
    """-> a head for a target, and what defines it"""
    around = surroundings()
    tensors, config = MADE["eagle3"]
    folder, config = written(tmp_path, tensors, **LLAMA | config)
    drafter = eagle.find(folder, config, around.model.config)(around, FREE_BYTES)
    drafter.cost = 0.0
    return drafter, Definition("eagle3", tensors, config, around.model)


def words(count, seq_id=1):
    return sequence([(seq_id * 31 + 7 * k) % 290 for k in range(count)], seq_id, temperature=0.0)


def test_long_prompts_are_read_over_several_guesses(small, monkeypatch):
    drafter, definition = small
    monkeypatch.setattr(catching_up, "CATCH_UP_ROWS", 20)
    long, short = words(46), words(9, 2)
    show(drafter, definition.model, long)
    show(drafter, definition.model, short)
    found = [guess(drafter, long, short) for _ in range(3)]
    assert [bool(one.tokens) for _, one in found] == [True, True, True]
    assert [one is CATCHING_UP for one, _ in found] == [True, True, False]
    assert assert_defined(drafter, definition, long) > 8


def test_who_reads_much_gets_its_drafts_with_the_next_guess(small, monkeypatch):
    """All guesses that say something take about as long."""
    drafter, definition = small
    monkeypatch.setattr(catching_up, "LONG", 30)
    long, short = words(32), words(31, 2)
    show(drafter, definition.model, long)
    show(drafter, definition.model, short)
    first, second = guess(drafter, long, short), guess(drafter, long, short)
    assert [one is CATCHING_UP for one in (*first, *second)] == [True, False, False, False]
    assert assert_defined(drafter, definition, long) > 8
    assert assert_defined(drafter, definition, short) > 8


def test_a_tree_may_lie_across_two_blocks_of_keys(small):
    drafter, definition = small
    one = words(KEY_BLOCK - 10)
    show(drafter, definition.model, one)
    assert guess(drafter, one, limit=32)[0].tokens
    _, tree = drafter._trees[1]
    assert len(tree.computed) > 20
    assert not tree.is_line
    assert assert_defined(drafter, definition, one) > 30


def test_who_makes_too_much_wait_starts_anew(small):
    drafter, definition = small
    drafter.waiting.max_rows = 30
    one, other = words(21), words(19, 2)
    show(drafter, definition.model, one)
    show(drafter, definition.model, other)
    assert [bool(found.tokens) for found in guess(drafter, one, other)] == [False, True]
    one.tokens += [4, 9, 2]
    show(drafter, definition.model, one, start=20)
    assert guess(drafter, one)[0].tokens
    assert drafter.waiting.of(1).first == 20
    assert assert_defined(drafter, definition, one) > 8


def test_what_others_read_of_a_step_does_not_stay_in_memory():
    """Rows of many sequences are copied together; who is never asked for keeps little more than its own."""
    waiting = WaitingFeatures(max_rows=50)
    everyone = [words(2, seq_id) for seq_id in range(10)]
    rows = [torch.full((1, 4), float(place)) for place in range(40)]
    most = 0
    for place in range(40):
        waiting.observe([Seen(one, place, (0,), (), (), (), (rows[place],), None) for one in everyone])
        for one in everyone:
            one.tokens.append(place)
        for one in everyone[1:]:
            assert waiting.of(one.seq_id).take(1).tolist() == rows[place].tolist()
        memory = [rows.untyped_storage() for rows in waiting.of(0).waiting]
        most = max(most, sum({one.data_ptr(): one.nbytes() for one in memory}.values()) // rows[0].nbytes)
    assert 40 < most <= 150
    assert waiting.of(0).take(40).tolist() == torch.cat(rows).tolist()


def test_who_lost_pages_goes_on_with_what_waits(small):
    drafter, definition = small
    one = words(40)
    show(drafter, definition.model, one)
    guess(drafter, one)
    drafter.kv.release(1)
    assert guess(drafter, one) == [NO_GUESS], "what it made is of no use alone"
    one.tokens += [4, 9]
    show(drafter, definition.model, one, start=39)
    assert guess(drafter, one)[0].tokens
    assert drafter.waiting.of(1).first == 39
    assert assert_defined(drafter, definition, one) > 8


def test_few_pages_are_for_those_who_find_room(small):
    drafter, definition = small
    drafter.kv = DraftKV(drafter.head.config, drafter.around.ops, 8, 16, 320, 8, torch.float32, CPU)
    everyone = [words(20 + seq_id, seq_id) for seq_id in range(1, 5)]
    for one in everyone:
        show(drafter, definition.model, one)
    for _ in range(3):
        found = guess(drafter, *everyone)
        assert 0 < sum(bool(one.tokens) for one in found) < 4


def test_rows_come_again_or_with_a_gap(small):
    drafter, definition = small
    one = words(30)
    show(drafter, definition.model, one, start=0, end=12)
    show(drafter, definition.model, one, start=4, end=20)  # preempted: computed once more
    show(drafter, definition.model, one, start=8)
    assert guess(drafter, one)[0].tokens
    assert drafter.waiting.of(1).first == 0
    assert assert_defined(drafter, definition, one) > 8
    one.tokens += [3, 1, 4, 1, 5]
    assert guess(drafter, one) == [NO_GUESS], "hidden states are missing"
    show(drafter, definition.model, one, start=32)
    assert guess(drafter, one)[0].tokens
    assert drafter.waiting.of(1).first == 32
    assert assert_defined(drafter, definition, one) > 8


def test_a_guess_that_nobody_verified_is_made_again(small):
    drafter, definition = small
    one = words(20)
    show(drafter, definition.model, one)
    first, second = guess(drafter, one), guess(drafter, one)
    assert first == second
    assert first[0].tokens


def test_the_drafts_that_stood_are_read_from_the_tree(small):
    """Of a tree's rows those on the path that was taken; all later guesses rest on them."""
    drafter, definition = small
    one = words(20)
    show(drafter, definition.model, one)
    drafts, parents, kept = (50, 60, 51, 52), (-1, -1, 0, 1), (1, 3)
    whole = true_features(definition.model, [*one.tokens, 60, 52], drafter.taps)
    rubbish = torch.full((1, CHAIN.hidden_size + 16), 7.0)
    part = tuple(torch.cat((tap[19:20], rubbish, tap[20:21], rubbish, tap[21:22])) for tap in whole)
    tokens = (one.tokens[-1], *drafts)
    drafter.observe([Seen(one, 19, tokens, parents, (60, 0, 52, 0, 77), kept, part, None)])
    one.tokens += [60, 52, 77]
    assert guess(drafter, one)[0].tokens
    assert assert_defined(drafter, definition, one) > 8


def test_broken_numbers_end_the_guessing_for_that_sequence_alone(small):
    drafter, definition = small
    broken, sound = words(20), words(21, 2)
    true = true_features(definition.model, broken.tokens[:-1], drafter.taps)
    features = tuple(torch.full_like(tap, float("nan")) for tap in true)
    drafter.observe([Seen(broken, 0, tuple(broken.tokens[:-1]), (), (), (), features, None)])
    show(drafter, definition.model, sound)
    assert [bool(found.tokens) for found in guess(drafter, broken, sound)] == [False, True]
    drafter.release(broken)
    again = words(22, 3)
    show(drafter, definition.model, again)
    assert guess(drafter, again)[0].tokens


def test_limits_are_kept(small):
    drafter, definition = small
    one = words(20)
    show(drafter, definition.model, one)
    for limit in (0, 1, 3, TREE_SLOTS):
        (found,) = drafter.guess([Want(one, limit)])
        paths(found)
        assert len(found.tokens) <= limit
    assert drafter.guess([]) == []
    assert guess(drafter, words(9, 7)) == [NO_GUESS], "nobody has seen it"
