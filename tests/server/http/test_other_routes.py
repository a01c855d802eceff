from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

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
    with running(served_model_name=("mine",)) as server:
        assert server.complete(model="mine", max_tokens=1)["model"] == "mine"
        assert server.post("/v1/completions", {"prompt": "x", "model": MODEL}).status_code == 404


def test_a_model_may_be_served_under_several_names() -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with running(served_model_name=("gpt-4o", "org/own", "gpt-4o")) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["gpt-4o", "org/own"]
        for model in listed:
            name = model["id"]
            assert server.get(f"/v1/models/{name}").json() == model
            assert server.complete(model=name, max_tokens=1)["model"] == name
            assert server.post("/v1/chat/completions", {**messages, "model": name}).json()["model"] == name
            streamed = server.post("/v1/chat/completions", {**messages, "model": name, "stream": True}).text
            chunks = [line for line in streamed.splitlines() if line.startswith("data: {")]
            assert {json.loads(line[6:])["model"] for line in chunks} == {name}
            assert server.post("/tokenize", {"prompt": "x", "model": name}).status_code == 200
        assert server.complete(max_tokens=1)["model"] == "gpt-4o"
        for unknown in (MODEL, "", "gpt-4o,org/own"):
            refused = server.post("/v1/completions", {"prompt": "x", "model": unknown})
            assert refused.status_code == 404
            assert check_envelope(refused.json())["param"] == "model"
        assert all('model_name="gpt-4o"' in name for name in server.metrics() if name.startswith("vllm:"))


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


@pytest.fixture(scope="module")
def with_admin_key() -> Iterator[Running]:
    with running(admin_key="k") as server:
        yield server


KEY = {"authorization": "Bearer k"}
GETS = [
    *("/v1/models", f"/v1/models/{MODEL}", "/tokenizer_info", "/live", "/health", "/ping", "/version"),
    *("/metrics", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/debug/scheduler"),
]
POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/ping"]


def test_the_lists_of_routes_are_whole(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    found = {method: {path for path in paths if method in paths[path]} for method in ("get", "post")}
    assert found["get"] <= {*GETS, "/v1/models/{model_id}"}
    assert found["post"] <= set(POSTS)


@pytest.mark.parametrize("path", [*GETS, "/", "/nowhere", "/v1/models/unknown"])
def test_head_is_answered_as_get_without_a_body(with_admin_key: Running, path: str) -> None:
    expected = with_admin_key.get(path, headers=KEY)
    assert expected.status_code == (200 if path in GETS else 404)
    host, _, port = with_admin_key.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"HEAD {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, _, rest = answer.decode().partition("\r\n")
    assert status.split()[1] == str(expected.status_code)
    assert rest.endswith("\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest.strip().split("\r\n"))
    assert headers["content-type"] == expected.headers["content-type"].lower()
    if path not in ("/metrics", "/debug/scheduler"):  # whose numbers change
        assert headers["content-length"] == expected.headers["content-length"]


@pytest.mark.parametrize("path", [path for path in POSTS if path != "/ping"])
def test_a_route_that_only_takes_post_says_so_to_head(server: Running, path: str) -> None:
    with server.client() as client:
        refused = client.head(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert client.put("/live").headers["allow"] == "GET, HEAD"


def test_a_head_is_counted_as_one_under_its_route() -> None:
    with running() as server, server.client() as client:
        client.head("/live/")
        assert server.metrics()['http_requests_total{handler="/live",method="HEAD",status="200"}'] == 1


@pytest.mark.parametrize("end", ["/", "//"])
def test_slashes_at_the_end_of_a_path_mean_nothing(with_admin_key: Running, end: str) -> None:
    """GET /v1/models/ spoke of a model without a name."""
    for path in GETS:
        answer = with_admin_key.get(path + end, headers=KEY)
        assert answer.status_code == 200, path
        if path not in ("/metrics", "/debug/scheduler"):
            assert answer.text == with_admin_key.get(path, headers=KEY).text
    for path in POSTS:
        answers = [with_admin_key.post(each, {"prompt": "x", "tokens": []}) for each in (path, path + end)]
        assert answers[0].status_code == answers[1].status_code != 404, path
    for path in ("/nowhere", "/v1", ""):
        refused = with_admin_key.get(path + end)
        assert refused.status_code == 404
        assert check_envelope(refused.json())["code"] == "unknown_route"


def test_ping_is_health() -> None:
    with running(start_engine=False) as server:
        for ping in (server.get("/ping"), server.post("/ping", {})):
            assert (ping.status_code, ping.json()) == (503, server.get("/health").json())
    with running() as server:
        for ping in (server.get("/ping"), server.post("/ping", {})):
            assert (ping.status_code, ping.json()) == (200, server.get("/health").json())


def test_tokenizer_info_has_what_a_remote_tokeniser_reads(server: Running) -> None:
    assert server.get("/tokenizer_info").json() == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "chat_template": "{# role: content #}",
        "model_max_length": 256,
        "vocab_size": 258,
    }


class References(HTMLParser):
    """What a page would have fetched, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.scripts = ""
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if name in ("src", "href", "action") and value]
        self._in_script = tag == "script"

    def handle_data(self, data: str) -> None:
        self.scripts += data if self._in_script else ""


def test_docs_need_no_other_host(server: Running) -> None:
    page = server.get("/docs").text
    found = References(page)
    quoted = re.findall(r"""["']([a-z]*:?//[^"']*|/[^"']*)["']""", found.scripts)
    assert "/openapi.json" in quoted
    assert '"validatorUrl": null' in found.scripts
    assert len(found.urls) >= 3
    for url in [*found.urls, *quoted]:
        assert url.startswith("/"), url
        assert not url.startswith("//"), url
        answer = server.get(url)
        assert answer.status_code == 200, url
        kind = answer.headers["content-type"]
        if kind.startswith("text/css"):
            outward = re.findall(r"""@import|url\((?!["']?data:)""", answer.text)
            assert not outward
    kinds = {url.rpartition(".")[2]: server.get(url).headers["content-type"] for url in found.urls}
    assert kinds["css"].startswith("text/css")
    assert "javascript" in kinds["js"]


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
