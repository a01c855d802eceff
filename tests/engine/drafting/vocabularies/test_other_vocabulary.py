"""A draft model with another vocabulary: nothing it does changes a text, and what both would say stands."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cuda_kernels.ops import pick
from engine.checkpoint import locate
from engine.drafting.draft_kv import DraftKV
from engine.drafting.guess import CATCHING_UP, NO_GUESS, Want
from engine.drafting.models import following
from engine.drafting.models.draft_model import DraftModel
from engine.drafting.vocabularies import following_text
from engine.drafting.vocabularies.other_vocabulary import OtherVocabulary, find
from engine.drafting.vocabularies.vocabulary_map import VocabularyMap
from engine.messages import Submit
from engine.models.transformer import Transformer
from engine.weights.errors import CheckpointError
from tests.engine.drafting.eager import eager
from tests.engine.drafting.heads.targets import sequence, surroundings
from tests.engine.drafting.models.small import drafts_stood
from tests.engine.drafting.test_speculative_text import told
from tests.engine.drafting.vocabularies.vocabularies import TEXTS, bytes_in_any_order, spellers, trained
from tests.engine.tiny import CPU, SETTINGS, TINY, abort, core_around, random_weights, request
from tests.engine.weights.folder import config_json, folder_tensors
from tests.engine.weights.stored import write

FREE = 2**28
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": ((17, 4.0),)},
}
PAIRS = [("coarse", "fine"), ("bpe", "coarse"), ("unigram", "bpe_no_prefix")]


def config_of(speller, num_layers=2):
    return replace(TINY, vocab_size=speller.size, layers=TINY.layers[:num_layers])


def drafter(around, target, draft, model=None, max_len=512, num_pages=128):
    """A draft model of one random layer with the vocabulary `draft`."""
    torch.set_num_threads(1)
    config = config_of(draft, 1)
    model = model or Transformer(config, random_weights(config, 5), pick(CPU))
    kv = DraftKV(model.config, model.ops, num_pages, 16, max_len + 64, 8, torch.float32, CPU)
    own = DraftModel(model, kv, around.model.config.vocab_size, around.processor_of)
    return OtherVocabulary(own, max_len, (target, draft), cost=0.01)


def permuted(around, target, draft):
    """The target itself behind a vocabulary in another order."""
    config = around.model.config
    weights = random_weights(config)
    order = [target.token_of(draft.bytes_of(token)) or 0 for token in range(draft.size)]
    for name in ("embedding", "head"):
        weights[name] = weights[name][order].clone()
    return drafter(around, target, draft, Transformer(config, weights, pick(CPU)))


def core_of(target, draft, make=drafter, **settings):
    config = config_of(target)
    drafters = lambda around: {"model": make(around, target, draft)}  # noqa: E731
    core = core_around(config, random_weights(config), replace(SETTINGS, **settings), drafters=drafters)
    return eager(core)


def asked(target, sampling, max_tokens=12, **fields):
    prompts = [target.encode(text.encode()[:40], begins=True) for text in TEXTS[:3]]
    prompts[1] = [*prompts[1], *target.special.values(), *target.encode(b"\xf0\x9f\x99", begins=False)]
    return [
        request(f"r{n}", prompt, max_tokens=max_tokens, seed=n, logprobs=1, **sampling, **fields)
        for n, prompt in enumerate(prompts)
    ]


def around_of(target):
    config = config_of(target)
    return surroundings(config, random_weights(config), 512)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_random_weights_never_give_another_text(names):
    target, draft = (spellers()[name] for name in names)
    core = core_of(target, draft)
    for sampling in SAMPLINGS.values():
        expected = told(core, asked(target, sampling))
        assert told(core, asked(target, sampling, method="speculative", drafter="model")) == expected
    assert not core.speculation.drafters["model"].following.alignments, "a text outlived its sequence"


@pytest.mark.parametrize("settings", [{"num_pages": 8}, {"max_num_seqs": 2, "max_num_batched_tokens": 16}])
def test_also_where_pages_places_or_tokens_are_few(settings):
    target, draft = spellers()["coarse"], spellers()["fine"]
    core = core_of(target, draft, lambda *of: drafter(*of, num_pages=9, max_len=80), **settings)
    for name in ("greedy", "warm"):
        expected = told(core, asked(target, SAMPLINGS[name]))
        found = asked(target, SAMPLINGS[name], method="speculative", drafter="model")
        assert told(core, found) == expected


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_model_behind_a_permuted_vocabulary_is_right(name):
    target, draft = spellers()["bytes"], bytes_in_any_order(7)
    core = core_of(target, draft, permuted)
    fields = {"method": "speculative", "drafter": "model", "max_draft_tokens": 4}
    expected = told(core, asked(target, SAMPLINGS[name], max_tokens=24))
    assert told(core, asked(target, SAMPLINGS[name], max_tokens=24, **fields)) == expected
    standing = core.speculation.drafters["model"]._mapped.standing
    stood, seen = drafts_stood(standing, drawn=SAMPLINGS[name]["temperature"] > 0.0)
    # A step commits at most four drafts and a token behind them; what the last steps had is not looked at.
    assert seen >= 3 * (24 - 1 - 5) / 2
    assert stood >= 0.97 * seen, "what it would say itself is what the target says"


def test_an_aborted_request_leaves_nothing_behind():
    target, draft = spellers()["coarse"], spellers()["fine"]
    core = core_of(target, draft)
    core.handle(Submit(request("a", [5, 6, 7], max_tokens=100, method="speculative", drafter="model")))
    for _ in range(6):
        core.step()
    drafter = core.speculation.drafters["model"]
    assert drafter.following.alignments
    abort(core, "a")
    core.step()
    assert not drafter.following.alignments
    assert drafter.draft.kv.num_free_blocks == drafter.draft.kv.num_blocks


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_text_that_grew_in_steps_is_drafted_for_like_one_that_came_at_once(temperature):
    """Whatever of the drafts stood, and whatever of the text the draft model spells anew."""
    target, draft = spellers()["coarse"], spellers()["fine"]
    around = around_of(target)
    grown = drafter(around, target, draft)
    one = sequence(target.encode(TEXTS[0].encode(), begins=True), temperature=temperature, seed=3)
    rng, guess, agreed = random.Random(0), NO_GUESS, 0
    for _ in range(25):
        stood = list(guess.tokens[: rng.randrange(3)]) if guess.parents[:2] == (-1, 0) else []
        one.tokens += [*stood, rng.randrange(target.size)]
        (guess,) = grown.guess([Want(one, 4)])
        fresh = drafter(around, target, draft)
        fresh._mapped.standing = grown._mapped.standing
        fresh.guess([Want(one, 4)])  # reads what there is, perhaps no more
        assert fresh.guess([Want(one, 4)]) == [guess]
        agreed += bool(guess.tokens)
    assert agreed > 20


def test_a_long_text_is_caught_up_with_in_parts(monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 50)
    target, draft = spellers()["coarse"], spellers()["fine"]
    made = drafter(around_of(target), target, draft)
    one = sequence(target.encode(" ".join(TEXTS[:1] * 3).encode(), begins=True), temperature=0.0)
    guesses = [made.guess([Want(one, 4)])[0] for _ in range(8)]
    assert guesses[0] is CATCHING_UP
    assert guesses[-1].tokens
    one.tokens += one.tokens * 10
    assert made.guess([Want(one, 4)]) == [NO_GUESS], "longer than the draft model can have it"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("names", [("bpe", "coarse"), ("unigram", "fine")], ids="-".join)
def test_a_text_of_which_the_draft_model_has_nothing_to_read_yet_gets_no_guess(names, temperature):
    """The space that such a target begins a text with is none of the text's, and the draft model has no
    token that begins one."""
    target, draft = (spellers()[name] for name in names)
    made = drafter(around_of(target), target, draft)
    space = target.token_of(b" ")
    one = sequence([target.bos, space], temperature=temperature)
    assert made.guess([Want(one, 4)]) == [NO_GUESS]
    one.tokens += target.encode(b"the cat", begins=False)
    assert made.guess([Want(one, 4)])[0].tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_long_text_is_spelled_in_parts_and_others_do_not_wait(temperature, monkeypatch):
    target, draft = spellers()["coarse"], spellers()["fine"]
    long, short = (
        sequence(target.encode(text.encode(), begins=True), number, temperature=temperature)
        for number, text in enumerate((" ".join(TEXTS), TEXTS[0]))
    )
    at_once = drafter(around_of(target), target, draft)
    at_once.guess([Want(long, 4)])
    (expected,) = at_once.guess([Want(long, 4)])
    monkeypatch.setattr(following_text, "READ_TOKENS", 40)
    made = drafter(around_of(target), target, draft)
    for number in range(1, 20):
        guess, other = made.guess([Want(long, 4), Want(short, 4)])
        left = number * 40 - len(short.tokens)
        assert bool(other.tokens) == (left >= 0)
        if guess.tokens:
            break
        assert guess is CATCHING_UP
        alignment = made.following.alignments.get(0)
        assert (alignment.num_read if alignment else 0) == max(0, min(left, len(long.tokens)))
    assert guess == expected
    assert left > len(long.tokens) - 40


def saying(around, target, draft, token):
    """A draft model that only ever says one token."""
    config = config_of(draft, 1)
    weights = {name: torch.zeros_like(value) for name, value in random_weights(config).items()}
    weights["embedding"].fill_(1.0)
    weights["final_norm"].fill_(1.0)
    weights["head"][token] = 1.0
    return drafter(around, target, draft, Transformer(config, weights, pick(CPU)))


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_special_tokens_are_drafted_where_both_have_them(temperature):
    target, draft = spellers()["coarse"], spellers()["fine"]
    one = sequence(target.encode(b"the cat", begins=True), temperature=temperature)
    shared = saying(around_of(target), target, draft, draft.special["<|user|>"])
    (guess,) = shared.guess([Want(one, 4)])
    assert guess.tokens[0] == target.special["<|user|>"]
    own = saying(around_of(target), target, draft, draft.special["<|stop|>"])
    (guess,) = own.guess([Want(one, 4)])
    assert not guess.tokens or max(guess.beliefs) < 0.1


def test_one_word_of_the_draft_model_is_as_many_of_the_targets_as_it_takes():
    target, draft = spellers()["bytes"], spellers()["coarse"]
    word = draft.encode(b" nation", begins=False)
    assert len(word) == 1
    one = sequence(target.encode(b"the inter", begins=True), temperature=0.0)
    (guess,) = saying(around_of(target), target, draft, word[0]).guess([Want(one, 10)])
    assert b"".join(map(target.bytes_of, guess.tokens)) == b" nation nation"[:10]
    assert guess.parents == tuple(range(-1, 9))


def test_numbers_that_are_not_finite_are_no_guess():
    target, draft = spellers()["coarse"], spellers()["fine"]
    made = drafter(around_of(target), target, draft)
    made.draft.model.final_norm.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        one = sequence([5, 6, 7], number=int(temperature), temperature=temperature)
        assert made.guess([Want(one, 4)]) == [NO_GUESS]
    assert made.draft.kv.storage.tainted


def test_vocabularies_with_nothing_in_common_are_refused():
    target, draft = spellers()["coarse"], spellers()["fine"]
    with pytest.raises(CheckpointError, match="no token in common"):
        VocabularyMap(target, draft, 0, 10, CPU)


def test_tokens_of_equal_bytes_are_the_same_across_kinds_of_vocabularies():
    shared = VocabularyMap(spellers()["bpe"], spellers()["coarse"], 10**6, 10**6, CPU)
    for token in range(spellers()["coarse"].size):
        if (theirs := shared.target_of(token)) is not None:
            assert spellers()["bpe"].bytes_of(theirs) == spellers()["coarse"].bytes_of(token)
            assert shared.draft_of(theirs) == token
    assert shared.num_shared > 60
    assert spellers()["bpe"].bytes_of(shared.target_of(spellers()["coarse"].token_of(b"\n"))) == b"\n"


def checkpoint(tmp_path, name, size, special):
    made = tmp_path / name
    made.mkdir()
    (made / "tokenizer.json").write_text(trained(size, special, tuple(TEXTS)))
    config = replace(TINY, vocab_size=size)
    return locate(str(write(made, folder_tensors(config, random_weights(config, 1)), config_json(config))))


def test_a_folder_is_loaded_and_drafts(tmp_path):
    target = checkpoint(tmp_path, "target", 400, ("<|end|>",))
    around = replace(surroundings(replace(TINY, vocab_size=400)), checkpoint=target)
    made = find(checkpoint(tmp_path, "draft", 350, ("<|stop|>",)), target)(around, FREE)
    wants = [Want(sequence([50, 60, 70], number, temperature=float(number)), 4) for number in range(2)]
    assert all(guess.tokens for guess in made.guess(wants))
    with pytest.raises(CheckpointError, match="no vocabulary to compare"):
        find(target, None)
    (target.path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokeniser's file is missing"):
        find(target, target)
