"""Block-diffusion drafters: their arithmetic against the published definition, their files, their manners."""

from __future__ import annotations

import pytest
import torch

from engine.drafting.dflash.drafter import find
from engine.drafting.dflash.heads import BlockHeads
from engine.drafting.guess import CATCHING_UP, NO_GUESS, Seen, Want
from engine.models.transformer import NORMED
from engine.weights.errors import CheckpointError
from tests.engine.drafting.dflash.dflash_folders import BASE, DSPARK, HIDDEN, SECOND, VOCAB, tensors, written
from tests.engine.drafting.dflash.dflash_reference import Reference
from tests.engine.drafting.heads.targets import sequence as one_sequence
from tests.engine.drafting.heads.targets import surroundings

GREEDY = {"temperature": 0.0}
FREE = 1 << 30
FORMS = {
    "plain": BASE,
    "biases": BASE | {"attention_bias": True},
    "sliding layers are causal": BASE
    | {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 7,
        "use_sliding_window": True,
    },
    "all causal": BASE | {"is_causal": True},
    "second": SECOND,
    "dspark": DSPARK,
    "dspark, gated": DSPARK | {"markov_head_type": "gated"},
    "dspark, with memory": DSPARK | {"markov_head_type": "rnn"},
    "dspark, part of the vocabulary": DSPARK | {"draft_vocab_size": 60},
    "dspark without heads": DSPARK | {"markov_rank": 0},
    "dspark by fields of dflash": BASE
    | {"dflash_config": BASE["dflash_config"] | {"target_layer_ids": [0]}}
    | {"projector_type": "dspark", "markov_rank": 8, "markov_head_type": "vanilla"},
}


@pytest.fixture(scope="module")
def around():
    return surroundings()


def drafter_of(folder, config, around, found=None):
    made = written(folder, config, found or tensors(config))
    return find(made, config, around.model.config)(around, FREE)


def reference(config, around, found=None):
    model = around.model
    return Reference(
        found or tensors(config),
        {**config, "dflash_config": config["dflash_config"] or {}},
        model.embedding.float(),
        model.head.float(),
    )


def features_of(drafter, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, HIDDEN, generator=generator) for _ in drafter.taps)


def seen(sequence, start, tokens, features, drawn=(7,), parents=(), kept=()):
    return Seen(sequence, start, tuple(tokens), parents, drawn, kept, features, None)


def line_of(guess):
    line, at = [], -1
    while at in guess.parents:
        at = guess.parents.index(at)
        line.append(guess.tokens[at])
    return line


def watched(monkeypatch):
    """The logits that the heads give, place by place, hopeless ones too."""
    monkeypatch.setattr("engine.drafting.dflash.drafter.LEAST_CHANCE", 0.0)
    given = []
    place = BlockHeads.place

    def noted(self, *args):
        found = place(self, *args)
        given.append(found[0].logits)
        return found

    monkeypatch.setattr(BlockHeads, "place", noted)
    return given


@pytest.mark.parametrize("name", FORMS)
def test_the_arithmetic_is_the_published_one(tmp_path, monkeypatch, around, name):
    config = FORMS[name]
    drafter = drafter_of(tmp_path, config, around)
    given = watched(monkeypatch)
    tokens = list(range(10, 30))
    sequences = [one_sequence(tokens, 0, **GREEDY), one_sequence(tokens[:9], 1, **GREEDY)]
    features = [features_of(drafter, len(one.tokens), one.seq_id) for one in sequences]
    drafter.observe(
        [seen(one, 0, one.tokens, values) for one, values in zip(sequences, features, strict=True)]
    )
    for one in sequences:
        one.tokens.append(7)
    guesses = drafter.guess([Want(one, 64) for one in sequences])
    first_row = drafter.config.first_row
    assert first_row == (0 if "dspark" in name else 1)
    assert drafter.config.num_drafts == 6 - first_row
    order = [1, 0]  # the shortest context first
    for place, index in enumerate(order):
        expected_tokens, expected = reference(config, around).greedy(
            torch.cat(features[index], dim=-1), 7, drafter.config.num_drafts, first_row
        )
        found = torch.stack([logits[place] for logits in given])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        drafted = line_of(guesses[index])
        assert drafted
        assert drafted[0] == expected_tokens[0]


@pytest.mark.parametrize("name", ["biases", "second", "dspark, gated", "dspark, with memory"])
def test_halves_compute_as_well(tmp_path, name):
    around = surroundings(dtype=torch.bfloat16)
    config = FORMS[name] | ({"enable_confidence_head": True} if "dspark" in name else {})
    drafter = drafter_of(tmp_path, config, around)
    sequence = one_sequence([1, 2, 3], temperature=0.8)
    features = tuple(tap.bfloat16() for tap in features_of(drafter, 3))
    drafter.observe([seen(sequence, 0, [1, 2, 3], features)])
    sequence.tokens.append(7)
    hidden = drafter._blocks(drafter._take_in([Want(sequence, 6)]))
    found = reference(config, around).hidden(torch.cat(features, dim=-1).float(), [7] + [299] * 5)
    assert torch.nn.functional.cosine_similarity(hidden[0].float(), found).min() > 0.99
    assert drafter.guess([Want(sequence, 6)])[0] != NO_GUESS


def test_a_context_that_grows_equals_one_that_is_taken_in_at_once(tmp_path, monkeypatch, around):
    drafter = drafter_of(tmp_path, BASE, around)
    given = watched(monkeypatch)
    features = features_of(drafter, 30)
    sequence = one_sequence([1, 2, 3, 4, 5], **GREEDY)
    drafter.observe([seen(sequence, 0, [1, 2, 3], tuple(tap[:3] for tap in features), drawn=())])
    assert drafter.guess([Want(sequence, 5)]) == [NO_GUESS], "the prompt is not computed yet"
    drafter.observe([seen(sequence, 3, [4, 5], tuple(tap[3:5] for tap in features), (6,))])
    sequence.tokens.append(6)
    assert drafter.guess([Want(sequence, 5)]) != [NO_GUESS]
    # a tree behind 6: 7 and 8, 9 behind 8; 8 and 9 stand, 10 was drawn behind them
    rows = [5, 20, 6, 7]
    drafter.observe(
        [
            seen(
                sequence,
                5,
                [6, 7, 8, 9],
                tuple(tap[rows] for tap in features),
                (8, 0, 9, 10),
                (-1, -1, 1),
                (1, 2),
            )
        ]
    )
    sequence.tokens += [8, 9, 10]
    # preempted: slices come again, and one goes further
    again = tuple(tap[2:5] for tap in features)
    drafter.observe([seen(sequence, 2, [3, 4, 5], again, drawn=())])
    given.clear()
    drafter.guess([Want(sequence, 5)])
    _, expected = reference(BASE, around).greedy(
        torch.cat([tap[[0, 1, 2, 3, 4, 5, 6, 7]] for tap in features], dim=-1), 10, 5, 1
    )
    torch.testing.assert_close(torch.cat(given), expected, rtol=1e-4, atol=1e-5)


def test_what_was_found_in_a_cache_is_not_in_the_context(tmp_path, monkeypatch, around):
    drafter = drafter_of(tmp_path, BASE, around)
    given = watched(monkeypatch)
    sequence = one_sequence(list(range(40)), **GREEDY)
    features = features_of(drafter, 8)
    drafter.observe([seen(sequence, 32, range(32, 40), features)])
    sequence.tokens.append(7)
    drafter.guess([Want(sequence, 5)])
    _, expected = reference(BASE, around).greedy(torch.cat(features, dim=-1), 7, 5, 1)
    torch.testing.assert_close(torch.cat(given), expected, rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_taken_in_over_several_guesses_and_lost_pages_begin_anew(
    tmp_path, around, monkeypatch
):
    monkeypatch.setattr("engine.drafting.heads.catching_up.CATCH_UP_ROWS", 16)
    drafter = drafter_of(tmp_path, BASE, around)
    sequence = one_sequence(list(range(40)), **GREEDY)
    drafter.observe([seen(sequence, 0, sequence.tokens, features_of(drafter, 40))])
    sequence.tokens.append(7)
    want = [Want(sequence, 5)]
    assert [drafter.guess(want)[0] is CATCHING_UP for _ in range(4)] == [True, True, False, False]
    drafter.kv.release(0)
    assert drafter.guess(want) == [NO_GUESS], "nothing is left that it could read again"
    drafter.observe([seen(sequence, 40, [7], features_of(drafter, 1), (8,))])
    sequence.tokens.append(8)
    assert drafter.guess(want) != [NO_GUESS]
    drafter.release(sequence)
    assert drafter.kv.num_free_blocks == drafter.kv.num_blocks
    assert drafter.guess(want) == [NO_GUESS]


def test_it_drafts_as_far_as_the_target_is_served(tmp_path, around):
    """Beyond what it was trained for guesses may be worse; there are some."""
    drafter = drafter_of(tmp_path, BASE | {"max_position_embeddings": 32}, around)
    sequence = one_sequence(list(range(200)), **GREEDY)
    drafter.observe([seen(sequence, 0, sequence.tokens, features_of(drafter, 200))])
    sequence.tokens.append(7)
    want = [Want(sequence, 5)]
    assert drafter.guess(want)[0] is CATCHING_UP, "it has read much"
    assert drafter.guess(want)[0].tokens


def test_the_confidence_of_a_place_scales_its_chances(tmp_path, around, monkeypatch):
    config = DSPARK | {"enable_confidence_head": True, "confidence_head_with_markov": True}
    drafter = drafter_of(tmp_path, config, around)
    found = []
    place = BlockHeads.place

    def noted(self, hidden, base, before, memory):
        result = place(self, hidden, base, before, memory)
        found.append((hidden[0], int(before[0]), result[0].confidence[0]))
        return result

    monkeypatch.setattr(BlockHeads, "place", noted)
    monkeypatch.setattr("engine.drafting.dflash.drafter.LEAST_CHANCE", 0.0)
    sequence = one_sequence([1, 2, 3], **GREEDY)
    drafter.observe([seen(sequence, 0, [1, 2, 3], features_of(drafter, 3))])
    sequence.tokens.append(7)
    drafter.guess([Want(sequence, 6)])
    assert len(found) == 6
    for hidden, before, confidence in found:
        expected = reference(config, around).confidence(before, hidden)[0]
        torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=1e-6)


def test_taps_are_what_comes_out_of_the_target_s_layers(tmp_path, around):
    assert drafter_of(tmp_path, BASE, around).taps == (1, NORMED)
    assert drafter_of(tmp_path, DSPARK, around).taps == (0, 1)


def test_limits_are_kept_and_what_is_not_finite_is_not_drafted(tmp_path, around):
    drafter = drafter_of(tmp_path, BASE, around)
    sequences = [one_sequence([1, 2, 3], number, **GREEDY) for number in range(4)]
    for one in sequences:
        features = features_of(drafter, 3, one.seq_id)
        if one.seq_id == 3:
            features = tuple(tap * float("nan") for tap in features)
        drafter.observe([seen(one, 0, [1, 2, 3], features)])
        one.tokens.append(7)
    limits = (1, 0, 30, 30)
    guesses = drafter.guess([Want(one, limit) for one, limit in zip(sequences, limits, strict=True)])
    assert len(guesses[0].tokens) == 1
    assert guesses[1] == NO_GUESS
    assert 1 < len(guesses[2].tokens) <= 30
    assert guesses[3] == NO_GUESS
    assert all(0 <= token < VOCAB for guess in guesses for token in guess.tokens)
    places = list(zip(guesses[2].parents, guesses[2].tokens, strict=True))
    assert len(set(places)) == len(places), "siblings differ"


@pytest.mark.parametrize(
    ("base", "config", "complaint"),
    [
        (
            BASE,
            {"architectures": ["LagunaDFlashModel"]},
            "architectures = .* is not supported; these are: DFlash",
        ),
        (
            BASE,
            {"speculators_model_type": "dflash"},
            "= 'dflash' is not supported: take the drafter as z-lab",
        ),
        (BASE, {"architectures": None}, "architectures = None is not supported"),
        (BASE, {"hidden_size": 64}, "hidden_size 64 and vocab_size 300, the model has 48 and 300: take"),
        (BASE, {"vocab_size": 301}, "take a drafter that was trained for this model"),
        (BASE, {"num_target_layers": 36}, "for a model of 36 layers, this one has 2"),
        (BASE, {"block_size": 1}, "block_size = 1 is not supported"),
        (BASE, {"block_size": 65}, "block_size = 65 is not supported; the limit is 64"),
        (BASE, {"dflash_config": {"target_layer_ids": [0, 1]}}, "lacks mask_token_id"),
        (BASE, {"dflash_config": {"target_layer_ids": [0], "mask_token_id": 300}}, "the vocabulary has 300"),
        (BASE, {"dflash_config": {"target_layer_ids": [2], "mask_token_id": 1}}, "the model's are 0 to 1"),
        (BASE, {"dflash_config": {"mask_token_id": 1}}, "target_layer_ids = None .* a list of layers"),
        (BASE, {"projector_type": "domino"}, "projector_type = 'domino' is not supported"),
        (BASE, {"attention_sink_bias": True}, "attention_sink_bias = True is not supported"),
        (BASE, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (BASE, {"layer_types": ["sliding_attention"] * 2}, "sliding_window = None is not supported"),
        (BASE, {"num_hidden_layers": 3, "layer_types": None}, "'layers.2.input_layernorm.weight' is missing"),
        (DSPARK, {"markov_head_type": "lstm"}, "markov_head_type = 'lstm' .*these are: vanilla, gated, rnn"),
        (DSPARK, {"target_layer_ids": [1]}, "the model's are -1 to 0"),
        (DSPARK, {"markov_rank": 9}, r"'markov_head.markov_w1.weight' has shape \[300, 8\]"),
        (DSPARK, {"markov_head_type": "gated"}, "'markov_head.gate_proj.weight' is missing"),
        (DSPARK, {"draft_vocab_size": 60}, r"markov_w2.weight' has shape \[300, 8\]"),
        (
            SECOND,
            {"dflash_config": SECOND["dflash_config"] | {"conv_group_size": 7}},
            "the hidden size is 48",
        ),
        (SECOND, {"dflash_config": SECOND["dflash_config"] | {"selector_rank": 5}}, "codebook' has shape"),
        (SECOND, {"sliding_window": 5}, "block_size = 6 is not supported"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, around, base, config, complaint):
    folder = written(tmp_path, base | config, tensors(base))
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        find(folder, base | config, around.model.config)(around, FREE)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_a_layer_with_more_than_is_known_is_refused(tmp_path, around):
    found = tensors(BASE) | {"layers.1.self_attn.g_proj.weight": torch.ones(4, HIDDEN)}
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.g_proj.weight' has no place"):
        drafter_of(tmp_path, BASE, around, found)


def test_names_may_stand_behind_model(tmp_path, around):
    found = {
        name if name == "lm_head.weight" else f"model.{name}": value
        for name, value in (tensors(DSPARK) | {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}).items()
    }
    drafter = drafter_of(tmp_path, DSPARK, around, found)
    assert torch.equal(drafter.heads.weights.head, torch.ones(VOCAB, HIDDEN))
    assert torch.equal(drafter.layers.projection, tensors(DSPARK)["fc.weight"])


def test_a_pickled_mask_is_never_opened(tmp_path, around):
    (tmp_path / "mask_embedding.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"mask_embedding.pt is pickled"):
        drafter_of(tmp_path, BASE, around)


def test_copies_of_the_target_s_vocabularies_are_not_kept(tmp_path, around):
    copies = {"embed_tokens.weight": around.model.embedding, "lm_head.weight": around.model.head}
    drafter = drafter_of(tmp_path, DSPARK, around, tensors(DSPARK) | copies)
    assert drafter.embedding is around.model.embedding
    assert drafter.heads.weights.head is around.model.head


def test_vocabularies_of_its_own_are_used(tmp_path, around, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    found = tensors(DSPARK) | {
        "embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
    }
    drafter = drafter_of(tmp_path, DSPARK, around, found)
    assert drafter.embedding is not around.model.embedding
    given = watched(monkeypatch)
    sequence = one_sequence([1, 2, 3], **GREEDY)
    features = features_of(drafter, 3)
    drafter.observe([seen(sequence, 0, [1, 2, 3], features)])
    sequence.tokens.append(7)
    drafter.guess([Want(sequence, 6)])
    _, expected = reference(DSPARK, around, found).greedy(torch.cat(features, dim=-1), 7, 6, 0)
    torch.testing.assert_close(torch.cat(given), expected, rtol=1e-4, atol=1e-4)
