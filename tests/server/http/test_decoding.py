"""How a request asks to be decoded, what it hears of it, and what is counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from engine.config import DRAFTERS
from engine.drafting import AUTO, LIGHT
from engine.messages import SequenceOutput, Verified
from scheduler.types import LossyAcceptance
from tests.server.fake_engine import FakeEngine, Live
from tests.server.http.conftest import Running, running


@dataclass
class Drafting(FakeEngine):
    """Every step had three drafts, of which two stood."""

    def _advance(self, live: Live) -> SequenceOutput:
        output = super()._advance(live)
        # Two drafters had a part in one round
        verified = (Verified("prompt_lookup", 2, (0,)), Verified("recycling", 1, (1,)))
        return msgspec.structs.replace(output, verified=verified)


def test_the_configuration_lists_the_drafters_there_are() -> None:
    assert {AUTO, *LIGHT} <= set(DRAFTERS)


def test_a_request_says_how_it_is_decoded_and_the_configuration_where_it_does_not(server: Running) -> None:
    def asked() -> tuple[str, str, int]:
        request = server.engine.requests[-1]
        return request.method, request.drafter, request.max_draft_tokens

    server.complete(max_tokens=1)
    assert asked() == ("autoregressive", "auto", 0)
    server.complete(max_tokens=1, decoding={"method": "speculative"})
    assert asked() == ("speculative", "auto", 0)
    fields = {"method": "speculative", "drafter": "recycling", "max_draft_tokens": 5}
    server.complete(max_tokens=1, decoding=fields)
    assert asked() == ("speculative", "recycling", 5)


@pytest.mark.parametrize(
    ("decoding", "param"),
    [
        ({"method": "beam"}, "decoding.method"),
        ({"drafter": "oracle"}, "decoding.drafter"),
        ({"drafter": ""}, "decoding.drafter"),
        ({"max_draft_tokens": 0}, "decoding.max_draft_tokens"),
        ({"max_draft_tokens": "4"}, "decoding.max_draft_tokens"),
        ("speculative", "decoding"),
        ({"lossy": {"acceptance": "typical"}}, "decoding.lossy"),  # drafts are off
        ({"method": "autoregressive", "lossy": {"acceptance": "typical"}}, "decoding.lossy"),
        ({"method": "speculative", "lossy": "typical"}, "decoding.lossy"),
        ({"method": "speculative", "lossy": {}}, "decoding.lossy.acceptance"),
        ({"method": "speculative", "lossy": {"acceptance": "any"}}, "decoding.lossy.acceptance"),
        *(
            ({"method": "speculative", "lossy": {"acceptance": rule, name: value}}, f"decoding.lossy.{name}")
            for rule, name, value in (
                ("typical", "epsilon", 0.0),
                ("typical", "delta", 1.5),
                ("threshold", "threshold", "0.3"),
                ("typical", "threshold", 0.3),  # each of the other rule
                ("threshold", "epsilon", 0.3),
            )
        ),
    ],
)
def test_what_cannot_be_is_named(server: Running, decoding: object, param: str) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "decoding": decoding})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_drafter_that_is_not_loaded_is_named_with_those_that_are(server: Running) -> None:
    body = {"prompt": "a", "decoding": {"method": "speculative", "drafter": "eagle"}}
    response = server.post("/v1/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "decoding.drafter")
    for told in ("eagle is not loaded", "auto", *server.engine.drafters, "draft_model"):
        assert told in error["message"]


def test_a_loaded_drafter_is_taken_and_the_configuration_may_name_one() -> None:
    engine = FakeEngine(drafters=("prompt_lookup", "eagle"))
    with running(engine, decoding="speculative", drafter="eagle") as server:
        server.complete(max_tokens=1)
        server.complete(max_tokens=1, decoding={"drafter": "prompt_lookup"})
    assert [request.drafter for request in server.engine.requests] == ["eagle", "prompt_lookup"]


@pytest.mark.parametrize(
    ("decoding", "param"),
    [
        ({"method": "speculative", "tree": True}, "decoding.tree"),
        (
            {"method": "speculative", "lossy": {"acceptance": "typical", "epsilom": 0.3}},
            "decoding.lossy.epsilom",
        ),
    ],
)
def test_fields_of_decoding_that_mean_nothing_are_refused(
    server: Running, decoding: dict[str, Any], param: str
) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "decoding": decoding})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


LOSSY = {
    "typical": (
        {"acceptance": "typical", "epsilon": 0.2},
        LossyAcceptance(rule="typical", epsilon=0.2, delta=0.3),
    ),
    "threshold": (
        {"acceptance": "threshold", "threshold": 0.5},
        LossyAcceptance(rule="threshold", threshold=0.5),
    ),
}


@pytest.mark.parametrize("rule", LOSSY)
def test_an_answer_says_that_its_text_is_lossy(server: Running, rule: str) -> None:
    asked, expected = LOSSY[rule]
    decoding = {"method": "speculative", "lossy": asked}
    whole = server.complete(max_tokens=3, decoding=decoding)
    assert server.engine.requests[-1].lossy == expected
    assert whole["decoding"] == {"method": "speculative", "lossy": rule}
    assert whole["usage"]["completion_tokens_details"]["lossy"] == rule


def chunks_of(server: Running, path: str, body: dict[str, object]) -> list[dict[str, Any]]:
    lines = server.post(path, body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_chunk_of_a_stream_says_it_and_none_of_another(server: Running, path: str) -> None:
    prompt = (
        {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    body = prompt | {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    lossy = {"method": "speculative", "lossy": {"acceptance": "typical"}}
    chunks = chunks_of(server, path, body | {"decoding": lossy})
    assert len(chunks) > 2
    assert {json.dumps(chunk["decoding"]) for chunk in chunks} == {
        '{"method": "speculative", "lossy": "typical"}'
    }
    assert chunks[-1]["usage"]["completion_tokens_details"]["lossy"] == "typical"
    for chunk in chunks_of(server, path, body | {"decoding": {"method": "speculative"}}):
        assert "decoding" not in chunk
        assert "completion_tokens_details" not in (chunk["usage"] or {})


@pytest.mark.parametrize(
    ("end", "count"), [({"stop": ["b"]}, 2), ({"stop_token_ids": [ord("a")]}, 1), ({"max_tokens": 1}, 1)]
)
def test_drafts_behind_the_end_of_a_text_are_not_counted_as_accepted(
    end: dict[str, object], count: int
) -> None:
    """Three tokens came at a time, of which the first two had been drafts."""
    with running(Drafting(tokens_per_step=3)) as server:
        fields = {"max_tokens": 9, "decoding": {"method": "speculative", "report": True}} | end
        usage = server.complete(**fields)["usage"]
    assert usage["completion_tokens"] == count
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": count,
        "rejected_prediction_tokens": 3 - count,
    }


def test_acceptance_is_in_the_usage_when_asked_and_in_the_metrics() -> None:
    with running(Drafting(tokens_per_step=3)) as server:
        quiet = server.complete(max_tokens=9)["usage"]
        assert "completion_tokens_details" not in quiet
        told = server.complete(max_tokens=9, decoding={"method": "speculative", "report": True})["usage"]
        assert told["completion_tokens_details"] == {
            "accepted_prediction_tokens": 6,
            "rejected_prediction_tokens": 3,
        }
        metrics = server.metrics()

    def counted(name: str, **labels: str) -> float:
        common = {"model_name": "org/fake"} | ({"engine": "0"} if name.startswith("vllm:") else {})
        shown = ",".join(f'{key}="{value}"' for key, value in sorted((common | labels).items()))
        return metrics[f"{name}_total{{{shown}}}"]

    assert counted("vllm:spec_decode_num_drafts") == 6, "rounds of verification, not drafters that had a part"
    assert counted("vllm:spec_decode_num_draft_tokens") == 18
    assert counted("vllm:spec_decode_num_accepted_tokens") == 12
    places = [counted("vllm:spec_decode_num_accepted_tokens_per_pos", position=str(at)) for at in range(4)]
    assert places == [6, 6, 0, 0]
    for drafter, drafts in (("prompt_lookup", 12), ("recycling", 6), ("lookahead", 0)):
        assert counted("octavo:spec_decode_draft_tokens", drafter=drafter) == drafts
        assert counted("octavo:spec_decode_accepted_tokens", drafter=drafter) == (6 if drafts else 0)
