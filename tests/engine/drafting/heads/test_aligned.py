"""Whatever happens to sequences, heads that know the target exactly are never wrong: what they read of a
token is what the target computed of it, and of no other."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.drafting.draft_kv import DraftKV
from engine.drafting.guess import NO_GUESS, ROOT, Guess
from engine.drafting.heads import catching_up
from engine.drafting.heads.head_drafter import HeadDrafter
from engine.drafting.heads.medusa import Medusa
from engine.drafting.heads.medusa_weights import MedusaWeights
from engine.drafting.kinds import NUM_CHANCES, NUM_KINDS
from engine.messages import Submit
from scheduler.invariants import check, check_empty
from tests.engine.drafting.eager import eager
from tests.engine.drafting.heads.targets import (
    CHAIN,
    NUM_WORDS,
    chain_head,
    chain_weights,
    following,
    knowing_head,
)
from tests.engine.tiny import CPU, SETTINGS, abort, core_around, request, run

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.3, "top_p": 0.95, "presence_penalty": 0.3}
SURENESS = {False: 4.0, True: 0.5}  # by whether tokens are drawn
NUM_REQUESTS = 6


class Scattered:
    """Knows the texts, and hides each right draft behind wrong ones: what stands lies apart."""

    taps = ()

    def __init__(self, texts, rng):
        self.texts = texts
        self.rng = rng
        self.num_kept = 0

    def guess(self, wants):
        return [self._tree(want) if self.rng.random() < 0.5 else NO_GUESS for want in wants]

    def _tree(self, want):
        one = want.sequence
        tokens, parents, at = [], [], ROOT
        for right in self.texts[one.request.request_id, one.index][one.num_output :]:
            wrong = {(right + self.rng.randrange(1, NUM_WORDS)) % NUM_WORDS for _ in range(2)}
            siblings = self.rng.sample([right, *wrong], 1 + len(wrong))
            if len(tokens) + len(siblings) > want.limit:
                break
            parents += [at] * len(siblings)
            at = len(tokens) + siblings.index(right)
            tokens += siblings
        return Guess(tuple(tokens), tuple(parents), (0,) * len(tokens), (0.9,) * len(tokens))

    def observe(self, seen):
        self.num_kept += sum(len(one.kept) for one in seen)

    def release(self, sequence):
        pass


def requests(rng, sampling, **fields):
    """Prompts of all lengths, some with a beginning in common, some up to the end of the context."""
    other = "medusa" if sampling is GREEDY else "auto"
    shared = [rng.randrange(NUM_WORDS) for _ in range(48)]
    found = []
    for number in range(NUM_REQUESTS):
        own = [rng.randrange(NUM_WORDS) for _ in range(rng.choice((1, 9, 40, 190)))]
        prompt = shared[: rng.choice((0, 20, 48))] + own
        own_fields = {
            "max_tokens": rng.choice((20, 60)) if len(own) < 190 else 100,
            "num_choices": rng.choice((1, 1, 3)),
            "seed": number,
        }
        speculative = {
            "drafter": rng.choice(("auto", "auto", "head", "scattered", other)),
            "max_draft_tokens": rng.choice((0, 0, 0, 1, 3)) or None,
        }
        if not fields:
            speculative = {}
        found.append(request(f"r{number}", prompt, **sampling, **own_fields, **speculative, **fields))
    return found


def first_choices(seen, stood, period=NUM_KINDS):
    """Of counts by kind: those of the drafts that their drafter thought the likeliest."""
    firsts = [kind for kind in seen if kind % period < NUM_CHANCES]
    return sum(seen[kind] for kind in firsts), sum(stood[kind] for kind in firsts)


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize(("from_token", "sampling"), [(False, GREEDY), (True, GREEDY), (True, DRAWN)])
def test_who_knows_the_target_is_never_wrong(seed, from_token, sampling, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(catching_up, "CATCH_UP_ROWS", rng.choice((30, 2048)))
    monkeypatch.setattr(catching_up, "LONG", rng.choice((5, 128)))
    weights = lambda: chain_weights(SURENESS[sampling is DRAWN])  # noqa: E731
    texts = plain_texts(requests(random.Random(seed), sampling), weights(), sampling)

    def drafters(around):
        head = knowing_head(around, from_token)
        num_pages = rng.choice((24, 40))
        kv = DraftKV(head.config, around.ops, num_pages, 16, 256 + 64, 16, around.dtype, CPU)
        found = {"head": HeadDrafter(head, kv, around, 0.01), "scattered": Scattered(texts, rng)}
        found["head"].waiting.max_rows = rng.choice((100, 10_000))
        if sampling is GREEDY:
            vocabularies = tuple(chain_head(2 + number) for number in range(4))
            found["medusa"] = Medusa(MedusaWeights(((),) * 4, vocabularies), around)
        return found

    few = replace(SETTINGS, num_pages=rng.choice((48, 64)), max_num_batched_tokens=rng.choice((24, 64)))
    core = eager(core_around(CHAIN, weights(), few, drafters=drafters))
    told = told_with_aborts(core, requests(random.Random(seed), sampling, method="speculative"), rng)
    for key, tokens in told.items():
        assert tokens == texts[key][: len(tokens)]
    assert sum(map(len, told.values())) > 200
    head, scattered = core.speculation.drafters["head"], core.speculation.drafters["scattered"]
    assert scattered.num_kept > 30
    seen, stood = first_choices(head.standing._seen, head.standing._stood)
    assert seen == stood > 30
    if sampling is GREEDY:
        standing = core.speculation.drafters["medusa"].trees.standing
        seen, stood = first_choices(standing._seen, standing._stood)
        assert seen == stood > 30
    assert not head.waiting._progress
    assert not head._trees
    assert head.kv.num_free_blocks == head.kv.num_blocks


def plain_texts(asked, weights, sampling):
    if sampling is GREEDY:
        return {
            (one.request_id, index): [
                following(one.prompt_ids[-1], count + 1) for count in range(one.sampling.max_tokens)
            ]
            for one in asked
            for index in range(one.num_choices)
        }
    heard = run(core_around(CHAIN, weights, SETTINGS), *asked)
    return {key: one.tokens for key, one in heard.items()}


def told_with_aborts(core, asked, rng):
    """-> what each choice was told; some are aborted on their way."""
    coming = list(asked)
    told = {(one.request_id, index): [] for one in asked for index in range(one.num_choices)}
    ended = set()
    while coming or core.has_work:
        if coming and rng.random() < 0.5:
            core.handle(Submit(coming.pop()))
        running = sorted(told.keys() - ended)
        if running and rng.random() < 0.02:
            abort(core, *rng.choice(running))
        for output in core.step().outputs:
            key = output.request_id, output.index
            told[key] += output.tokens
            assert not output.error, output.error
            if output.finish is not None:
                ended.add(key)
        check(core.scheduler)
    check_empty(core.scheduler)
    assert not core.speculation.failed, "a drafter raised"
    return told
