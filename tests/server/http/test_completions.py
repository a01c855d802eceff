from __future__ import annotations

import pytest

from engine.messages import TokenLogprobs
from server.logprobs import legacy_logprobs
from server.streams import Piece
from tests.server.byte_tokenizer import BOS, EOS, ByteTokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import MODEL, Running, running


def test_answer_has_openai_shape(server: Running) -> None:
    answer = server.complete(max_tokens=4)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_default_is_sixteen_tokens(server: Running) -> None:
    assert server.complete()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hi", 1), (["hi", "ho"], 2), ([104, 105], 1), ([[104, 105], [104]], 2)],
)
def test_prompt_shapes_and_choice_order(server: Running, prompt: object, count: int) -> None:
    answer = server.complete(prompt=prompt, n=2, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "bc"] * count


def test_each_prompt_is_a_request_with_the_same_seed(server: Running) -> None:
    server.complete(prompt=["a", "b"], max_tokens=1, seed=-1)
    first, second = server.engine.requests[-2:]
    assert first.request_id.rpartition("-")[0] == second.request_id.rpartition("-")[0]
    assert (first.request_id[-2:], second.request_id[-2:]) == ("-0", "-1")
    assert first.sampling.seed == second.sampling.seed == 2**64 - 1


def test_equal_prompts_without_a_seed_draw_one_each(server: Running) -> None:
    """Sixty copies of a prompt gave one text sixty times."""
    server.complete(prompt=["a"] * 30, max_tokens=1)
    server.complete(prompt=["a"] * 30, max_tokens=1)
    seeds = [request.sampling.seed for request in server.engine.requests[-60:]]
    assert len(set(seeds)) == 60
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_fields_reach_the_engine(server: Running) -> None:
    server.complete(
        max_tokens=9,
        temperature=0.5,
        top_p=0,
        top_k=-1,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        min_tokens=3,
        stop_token_ids=[7],
        logit_bias={"5": -100, "3": 1.5},
        allowed_token_ids=[4, 2, 4],
        bad_words=["x"],
        priority=-3,
        cache_salt="salt",
        user="someone",
        timeout_s=5,
        logprobs=2,
    )
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (request.priority, bool(request.cache_salt), request.tenant) == (-3, True, "someone")
    assert request.deadline_s == request.arrival_s + 5
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.typical_p) == (0.5, 0, 0.1, 0.9)
    assert 0 < sampling.top_p < 1e-3
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.2,
        0.3,
        -0.4,
    )
    assert (sampling.min_tokens, sampling.max_tokens, sampling.logprobs) == (3, 9, 2)
    assert sampling.stop_token_ids == (EOS, 7)
    assert sampling.logit_bias == ((3, 1.5), (5, -100.0))
    assert sampling.allowed_token_ids == (2, 4)
    assert sampling.bad_words == ((120,), (32, 120))


def test_ignore_eos_leaves_only_the_users_stop_ids(server: Running) -> None:
    server.complete(max_tokens=1, ignore_eos=True, stop_token_ids=[7])
    assert server.engine.requests[-1].sampling.stop_token_ids == (7,)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
def test_stop_string_cuts_text_tokens_and_logprobs(tokens_per_step: int) -> None:
    with running(FakeEngine(tokens_per_step=tokens_per_step)) as server:
        answer = server.complete(max_tokens=20, stop=["ef", "zz"], logprobs=0, return_token_ids=True)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abcd", "stop", "ef")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
        assert choice["token_ids"] == [*b"abcd"]
        assert answer["usage"]["completion_tokens"] == 6
        kept = server.complete(max_tokens=20, stop="ef", include_stop_str_in_output=True)["choices"][0]
        assert kept["text"] == "abcdef"
        assert not server.engine.live


def test_the_engine_hears_whether_a_text_ended_or_was_cut() -> None:
    with running(FakeEngine(step_s=0.01)) as server:
        server.complete(max_tokens=200, stop="c", n=2)
        assert [*server.engine.natural.values()] == [True, True]
        server.engine.stuck = True
        server.post("/v1/completions", {"prompt": "x", "timeout_s": 0.1})
        assert [*server.engine.natural.values()] == [True, True, False]


def test_stop_strings_wait_for_min_tokens(server: Running) -> None:
    choice = server.complete(max_tokens=30, stop="c", min_tokens=5)["choices"][0]
    assert choice["text"] == "abcdefghijklmnopqrstuvwxyzab"


def test_held_back_text_comes_out_at_the_end(server: Running) -> None:
    assert server.complete(max_tokens=4, stop="dx")["choices"][0]["text"] == "abcd"


def test_a_special_token_written_as_a_stop_string_stops() -> None:
    """It never matched: the text of special tokens was left out before stop strings were looked for."""
    reply = [*b"one", BOS, *b"two", BOS, *b"three"]
    with running(FakeEngine(reply=lambda request, index: reply, tokens_per_step=2)) as server:
        for stop, text in (("<bos>", "one"), ("o<bos>th", "onetw"), ("bos>t", "one")):
            for chosen in ({}, {"skip_special_tokens": False}):
                choice = server.complete(stop=stop, logprobs=0, **chosen)["choices"][0]
                shown = text if not chosen else {"one": "one", "onetw": "one<bos>tw"}[text]
                shown += "<" if stop == "bos>t" and chosen else ""
                assert (choice["text"], choice["stop_reason"]) == (shown, stop)
        kept = server.complete(stop="<bos>t", include_stop_str_in_output=True, logprobs=0)["choices"][0]
        assert kept["text"] == "one<bos>t"
        assert kept["logprobs"]["tokens"] == ["o", "n", "e", "<bos>", "t"]
        assert kept["logprobs"]["text_offset"] == [0, 1, 2, 3, 8]


def test_a_stop_string_begun_within_min_tokens_stops() -> None:
    """Only what came after min_tokens was searched."""
    with running(FakeEngine(tokens_per_step=4)) as server:
        choice = server.complete(max_tokens=20, stop="cdef", min_tokens=5)["choices"][0]
        assert (choice["text"], choice["stop_reason"]) == ("ab", "cdef")
        choice = server.complete(max_tokens=8, stop="cdef", min_tokens=6)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abcdefgh", "length")


def test_end_of_sequence_has_no_text_and_no_stop_reason() -> None:
    with running(FakeEngine(reply=lambda request, index: [*b"ok", EOS, *b"no"])) as server:
        choice = server.complete(skip_special_tokens=False, logprobs=1)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ok", "stop", None)
        assert choice["logprobs"]["tokens"] == ["o", "k", "<eos>"]
        by_id = server.complete(stop_token_ids=[107])["choices"][0]
        assert (by_id["text"], by_id["stop_reason"]) == ("o", 107)


def test_split_characters_are_joined_and_broken_ones_replaced() -> None:
    text = "né€".encode()
    with running(FakeEngine(reply=lambda request, index: [*text, 0xE2, 0x82])) as server:
        answer = server.complete(logprobs=0)["choices"][0]
        assert answer["text"] == "né€\ufffd"
        assert answer["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 3]


def test_legacy_logprobs_hold_the_chosen_token(server: Running) -> None:
    logprobs = server.complete(max_tokens=2, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.1, -0.1],
        "top_logprobs": [{"b": -0.05, "a": -0.1}, {"c": -0.05, "b": -0.1}],
        "text_offset": [0, 1],
    }


def test_alternatives_that_are_parts_of_characters_have_keys_of_their_own() -> None:
    """All of them were one replacement character, of which one was left."""
    with running(FakeEngine(reply=lambda request, index: [*"…".encode()])) as server:
        logprobs = server.complete(logprobs=5)["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x80", "bytes:\\xa6"]
        assert list(logprobs["top_logprobs"][0]) == [
            *("bytes:\\xe3", "bytes:\\xe4", "bytes:\\xe5", "bytes:\\xe6", "bytes:\\xe7"),
            "bytes:\\xe2",  # the chosen one, which is not among the five
        ]
        echoed = server.complete(prompt="…", echo=True, logprobs=5, max_tokens=0)["choices"][0]["logprobs"]
        assert echoed["tokens"] == ["bytes:\\xe2", "bytes:\\x80", "bytes:\\xa6"]
        assert [len(top) for top in echoed["top_logprobs"][1:]] == [6, 6]


def test_tokens_are_named_by_their_ids_where_that_is_asked_for(server: Running) -> None:
    asked = {"logprobs": 2, "max_tokens": 1, "return_tokens_as_token_ids": True}
    logprobs = server.complete(prompt="xy", echo=True, **asked)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:120", "token_id:121", "token_id:97"]
    assert list(logprobs["top_logprobs"][-1]) == ["token_id:98", "token_id:99", "token_id:97"]
    asked["return_tokens_as_token_ids"] = False
    assert server.complete(**asked)["choices"][0]["logprobs"]["tokens"] == ["a"]


class Twins(ByteTokenizer):
    """Ids 98 and 99 have the text of 97, and " …" but for its last byte is one token."""

    def token_bytes(self, token: int) -> bytes:
        return {98: b"a", 99: b"a", 100: " …".encode()[:-1], 101: b"\\\xff"}.get(token) or bytes([token])


def test_alternatives_of_one_text_have_keys_of_their_own() -> None:
    def legacy(chosen: int, *top: int) -> dict[str, float]:
        found = tuple((token, -float(place)) for place, token in enumerate(top, start=1))
        logprob = dict(found).get(chosen, -9.0)
        piece = Piece(chosen, TokenLogprobs(chosen, logprob, 1, found), 0)
        logprobs = legacy_logprobs(Twins(), [piece], len(top), 0)  # type: ignore[arg-type]
        shown = logprobs.top_logprobs[0]
        assert shown is not None
        assert shown[logprobs.tokens[0]] == logprobs.token_logprobs[0] == logprob
        return shown

    assert legacy(120, 97, 99, 98) == {"a": -1.0, "token_id:99": -2.0, "token_id:98": -3.0, "x": -9.0}
    assert legacy(98, 97, 98, 99) == {"token_id:97": -1.0, "a": -2.0, "token_id:99": -3.0}
    assert legacy(98, 97) == {"token_id:97": -1.0, "a": -9.0}
    assert legacy(101, 100) == {"bytes: \\xe2\\x80": -1.0, "bytes:\\x5c\\xff": -9.0}


def test_echo_with_logprobs_scores_the_prompt(server: Running) -> None:
    choice = server.complete(prompt="xyz", echo=True, logprobs=1, max_tokens=2)["choices"][0]
    assert choice["text"] == "xyzab"
    assert choice["logprobs"]["tokens"] == ["x", "y", "z", "a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.1, -0.1]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"z": -0.05, "y": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_scoring_alone_generates_nothing(server: Running) -> None:
    answer = server.complete(prompt=[[120, 121], [122]], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["xy", "z"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_leaves_out_the_bos_that_was_added() -> None:
    with running(tokenizer=ByteTokenizer(add_bos=True)) as server:
        choice = server.complete(prompt="xy", echo=True, logprobs=0, max_tokens=1)["choices"][0]
        assert server.engine.requests[-1].prompt_ids[0] == BOS
        assert choice["text"] == "xya"
        assert choice["logprobs"]["tokens"] == ["<bos>", "x", "y", "a"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
        server.complete(prompt="xy", add_special_tokens=False)
        assert server.engine.requests[-1].prompt_ids == (120, 121)


def test_prompt_logprobs_in_vllms_shape(server: Running) -> None:
    choice = server.complete(prompt="xy", prompt_logprobs=1, max_tokens=1)["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "122": {"logprob": -0.05, "rank": 1, "decoded_token": "z"},
            "121": {"logprob": -0.5, "rank": 2, "decoded_token": "y"},
        },
    ]
    assert choice["logprobs"] is None


def test_best_of_keeps_the_likeliest(server: Running) -> None:
    answer = server.complete(prompt=["p", "q"], n=2, best_of=4, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "bc"] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 16
