from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from openapi_spec_validator import validate

from scheduler.refusal import RefusalReason
from server.logs import JsonFormatter, PlainFormatter, sanitise
from server.prompt import ChatTemplate
from server.routes import completions, generation
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import MODEL, Running, make_service, running
from tests.server.http.test_bad_input import check_envelope


def test_models(server: Running) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert listed["data"][0]["max_model_len"] == 256
    assert server.get(f"/v1/models/{MODEL}").json() == listed["data"][0]


def test_served_name_replaces_the_checkpoints() -> None:
    with running(served_model_name="mine") as server:
        assert server.complete(model="mine", max_tokens=1)["model"] == "mine"
        assert server.post("/v1/completions", {"prompt": "x", "model": MODEL}).status_code == 404


def test_tokenize_and_back(server: Running) -> None:
    answer = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [*"hé".encode()],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert bytes(chat["tokens"]) == b"user: x\nassistant: "


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a" * 2_000_000}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ],
)
def test_bad_token_requests(server: Running, path: str, body: dict[str, object], param: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert check_envelope(answer.json())["param"] == param


def test_version_and_docs(server: Running) -> None:
    assert server.get("/version").json()["version"]
    assert server.get("/docs").status_code == 200
    document = server.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "Completion", "ChatCompletion", "ErrorEnvelope"):
        assert name in schemas
    references = [part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
    assert set(references) <= set(schemas)


def test_the_document_is_what_openapi_says_a_document_is(server: Running) -> None:
    validate(server.get("/openapi.json").json())


def test_the_server_never_imports_torch() -> None:
    code = (
        "import sys, server.serve; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_log_lines_name_the_request_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("octavo")
    logger.propagate = True
    with caplog.at_level(logging.INFO, "octavo"), running() as server:
        body = {"prompt": "secret words", "max_tokens": 2}
        server.post("/v1/completions", body, headers={"x-request-id": "my-id"})
    lines = [PlainFormatter().format(record) for record in caplog.records]
    done = next(line for line in lines if "path=/v1/completions" in line)
    assert "request=my-id" in done
    assert "status=200" in done
    assert "output_tokens=2" in done
    assert "finish=length" in done
    assert not any("secret" in line for line in lines)
    as_json = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert any(line["event"] == "request" and line["status"] == 200 for line in as_json)


def test_a_refusals_line_in_the_log_says_what_was_wrong(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.INFO, "octavo"), running(api_keys=("k",), max_body_bytes=1000) as server:
        key = {"authorization": "Bearer k"}
        server.post("/v1/completions", {"prompt": "x", "temperature": 9}, headers=key)
        server.post("/v1/completions", {"prompt": "x", "model": "other"}, headers=key)
        server.post("/v1/completions", {"prompt": "x" * 2000}, headers=key)
        server.post("/v1/completions", {"prompt": "x"})
        server.get("/nowhere", headers=key)
        server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=key)
    lines = [record.fields for record in caplog.records if record.getMessage() == "request"]
    assert [(line["status"], line.get("code"), line.get("param")) for line in lines] == [
        (400, "invalid_value", "temperature"),
        (404, "model_not_found", "model"),
        (413, "body_too_large", None),
        (401, "invalid_api_key", None),
        (404, "unknown_route", None),
        (200, None, None),
    ]


def test_prompts_and_outputs_are_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.INFO, "octavo"), running(log_prompts=True) as server:
        server.complete(prompt="the words", max_tokens=3)
    lines = [PlainFormatter().format(record) for record in caplog.records]
    assert any(line.endswith('text="the words"') for line in lines)
    assert any(line.endswith("text=abc") for line in lines)


def test_the_log_says_how_a_request_ended(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    engine = FakeEngine(error="too late", refusal=RefusalReason.DEADLINE)
    with caplog.at_level(logging.INFO, "octavo"), running(engine) as server:
        server.post("/v1/completions", {"prompt": "x"})
        engine.error = None
        server.complete(max_tokens=2, n=2)
    ends = [record.fields["finish"] for record in caplog.records if "finish" in getattr(record, "fields", {})]
    assert ends == ["deadline_unmeetable", "length"]


def test_fields_without_effect_are_named(server: Running) -> None:
    def ignored(path: str, body: dict[str, object]) -> str | None:
        answer = server.post(path, {**body, "max_tokens": 1})
        assert answer.status_code == 200
        return answer.headers.get("x-octavo-ignored-fields")

    messages = {"messages": [{"role": "user", "content": "hi"}]}
    assert ignored("/v1/completions", {"prompt": "hi", "priority": 3, "store": True}) == "priority,store"
    assert server.engine.requests[-1].priority == 3
    assert ignored("/v1/completions", {"prompt": "hi", "store": None, "priority": None}) is None
    assert (
        ignored("/v1/chat/completions", {**messages, "parallel_tool_calls": False}) == "parallel_tool_calls"
    )
    assert ignored("/v1/chat/completions", messages) is None


def test_priority_has_an_effect_under_its_policy() -> None:
    with running(policy="priority") as server:
        answer = server.post("/v1/completions", {"prompt": "hi", "priority": -7, "store": True})
        assert answer.headers["x-octavo-ignored-fields"] == "store"
        assert server.engine.requests[-1].priority == -7


def test_large_bodies_and_answers_do_not_run_on_the_loop(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, bool] = {}

    def note(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **kwargs: object) -> object:
            threads[name] = threading.current_thread().name.startswith("AnyIO")
            return work(*args, **kwargs)

        return noted

    monkeypatch.setattr(completions, "parse_body", note("body", completions.parse_body))
    monkeypatch.setattr(generation, "json_response", note("answer", generation.json_response))
    server.complete(max_tokens=2)
    assert threads == {"body": False, "answer": False}
    server.complete(max_tokens=200, n=2, metadata={"x": "a" * 2**16})
    assert threads == {"body": True, "answer": True}


def test_a_template_that_does_not_compile_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    service = make_service(FakeEngine())
    service.template = ChatTemplate("a\n{% if %}")
    with caplog.at_level(logging.ERROR, "octavo"):
        asyncio.run(service.check_template())
    (record,) = caplog.records
    assert PlainFormatter().format(record).count("line 2") == 1
    service.template.close()


@pytest.mark.parametrize("formatter", [PlainFormatter(), JsonFormatter()])
def test_no_value_forges_a_line(formatter: logging.Formatter) -> None:
    evil = "a\n2026-01-01 00:00:00 ERROR \x1b[31m\x7f\x85\u2028\ud800\U000e0001"
    try:
        raise ValueError(evil)
    except ValueError:
        trace = sys.exc_info()
    record = logging.LogRecord("octavo", logging.INFO, "", 0, f"event {evil}", (), trace)
    record.fields = {"text": evil, "bare": "x\ny"}
    first, *more = formatter.format(record).split("\n")
    assert all(line.isprintable() for line in (first, *more))
    assert all(line.startswith("    ") for line in more)
    shown = formatter.format(record)
    assert "\\u001b[31m" in shown
    assert r"x\ny" in shown
    if isinstance(formatter, JsonFormatter):
        assert json.loads(first)["text"] == evil


def test_sanitised_text_is_one_short_line() -> None:
    assert sanitise("a\nb\x1b\u2028c") == "a?b??c"
    assert len(sanitise("x" * 10_000)) == 201
