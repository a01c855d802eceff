"""How a request asks to be decoded, what it hears of it, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from engine.config import DRAFTERS
from engine.drafting import AUTO
from engine.drafting import DRAFTERS as REGISTERED
from engine.messages import SequenceOutput, Verified
from tests.server.fake_engine import FakeEngine, Live
from tests.server.http.conftest import Running, running


@dataclass
class Drafting(FakeEngine):
    """Every step had three drafts, of which two stood."""

    def _advance(self, live: Live) -> SequenceOutput:
        output = super()._advance(live)
        return msgspec.structs.replace(output, verified=Verified("prompt_lookup", 3, 2))


def test_the_configuration_lists_the_drafters_there_are() -> None:
    assert (AUTO, *REGISTERED) == DRAFTERS


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
    ],
)
def test_what_cannot_be_is_named(server: Running, decoding: object, param: str) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "decoding": decoding})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_acceptance_is_in_the_usage_when_asked_and_in_the_metrics() -> None:
    with running(Drafting(tokens_per_step=3)) as server:
        quiet = server.complete(max_tokens=9)["usage"]
        assert "completion_tokens_details" not in quiet
        told = server.complete(max_tokens=9, decoding={"method": "speculative", "report": True})["usage"]
        assert told["completion_tokens_details"] == {
            "accepted_prediction_tokens": 6,
            "rejected_prediction_tokens": 3,
        }
        with server.client() as client:
            text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:spec_decode") and "_total" in line]
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "position" not in line}
    assert values == {
        "vllm:spec_decode_num_drafts_total": 6,
        "vllm:spec_decode_num_draft_tokens_total": 18,
        "vllm:spec_decode_num_accepted_tokens_total": 12,
    }
    places = [line for line in lines if "per_pos" in line]
    assert [float(line.split()[-1]) for line in places] == [6, 6]
