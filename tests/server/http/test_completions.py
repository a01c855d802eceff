from __future__ import annotations

import pytest

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


def test_a_request_without_seed_draws_one(server: Running) -> None:
    server.complete(max_tokens=1)
    server.complete(max_tokens=1)
    assert server.engine.requests[-1].sampling.seed != server.engine.requests[-2].sampling.seed


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


def test_unknown_fields_are_named_in_a_header(server: Running) -> None:
    body = {"prompt": "x", "stream": True, "grammar": "g", "stream_options": {"extra": 1}}
    header = server.post("/v1/completions", body).headers["x-octavo-ignored-fields"]
    assert header == "grammar,stream_options.extra"
    hostile = {"prompt": "x", "max_tokens": 1, "a\r\nset-cookie: x": 1, "é" * 2000: 2}
    header = server.post("/v1/completions", hostile).headers["x-octavo-ignored-fields"]
    assert "\n" not in header
    assert len(header) < 500
