"""TLS and Unix sockets: served like any other, refused in one line, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from server.listener import TlsError, bind_unix, is_loopback, tls_context, url_of
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import running
from tests.server.http.sockets import LAST_LIVE, LIVE, many_files, text_of
from tests.server.http.test_disconnect import within

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
STREAM = {"prompt": "x", "max_tokens": 40, "stream": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself, its key plain and encrypted, and somebody else's key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    for command in (
        f"{certificate} {subject} -keyout key.pem -out cert.pem",
        f"{certificate} {subject} -keyout other.pem -out other_cert.pem",
        "ec -in key.pem -aes128 -passout pass:secret -out locked.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    (folder / "text.pem").write_text("nothing")
    return folder


def tls(files: Path, **names: str) -> dict[str, str]:
    return {f"ssl_{name}": str(files / value) for name, value in names.items()}


@needs_openssl
@pytest.mark.parametrize(
    ("names", "password"),
    [
        ({"certfile": "cert.pem", "keyfile": "key.pem"}, ""),
        ({"certfile": "both.pem"}, ""),
        ({"certfile": "cert.pem", "keyfile": "locked.pem"}, "secret"),
    ],
)
def test_requests_and_streams_over_tls(files: Path, names: dict[str, str], password: str) -> None:
    context = ssl.create_default_context(cafile=str(files / "cert.pem"))
    with (
        running(FakeEngine(step_s=0.002), **tls(files, **names), ssl_keyfile_password=password) as server,
        httpx.Client(base_url=server.url, verify=context, timeout=10) as client,
    ):
        assert server.url.startswith("https://127.0.0.1:")
        assert client.get("/live").status_code == 200
        for _ in range(2):
            text = client.post("/v1/completions", json=STREAM).text
            assert len(text_of(text)) == 40
            assert text.endswith("data: [DONE]\n\n")
        long = {"prompt": "x" * 200, "max_tokens": 3, "metadata": {"x": "y" * 500_000}}
        assert client.post("/v1/completions", json=long).status_code == 200


@needs_openssl
def test_a_client_over_tls_that_leaves_or_does_not_read_is_noticed(files: Path) -> None:
    names = tls(files, certfile="cert.pem", keyfile="key.pem")
    engine = FakeEngine(max_model_len=50_000, tokens_per_step=50)
    context = ssl._create_unverified_context()
    with running(engine, send_timeout_s=0.5, head_timeout_s=0.5, **names) as server:
        host, port = server.url.removeprefix("https://").split(":")
        body = b'{"prompt": "x", "max_tokens": 20000, "stream": true, "logprobs": 5}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        for leaves in (True, False):
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client = context.wrap_socket(raw)
                client.sendall(head + body)
                client.recv(100)
                if leaves:
                    client.close()
                within(10, lambda: not server.service._active)
                assert server.service.buffers.outgoing.num_bytes == 0
                client.close()
        with socket.create_connection((host, int(port)), timeout=10) as silent:  # no handshake
            began = time.monotonic()
            assert silent.recv(100) == b""
            assert time.monotonic() - began < 5


@needs_openssl
def test_handshakes_that_do_not_end_are_connections_like_others(files: Path) -> None:
    names = tls(files, certfile="cert.pem", keyfile="key.pem")
    context = ssl._create_unverified_context()
    with (
        many_files(1000),
        running(max_connections=20, head_timeout_s=30.0, **names) as server,  # type: ignore[arg-type]
        ExitStack() as held,
    ):
        host, port = server.url.removeprefix("https://").split(":")
        for _ in range(300):  # far beyond the places that are kept for probes
            held.enter_context(socket.create_connection((host, int(port)), timeout=10))
        with httpx.Client(base_url=server.url, verify=context) as client:
            assert client.get("/live").status_code == 200
        with httpx.Client(base_url=server.url, verify=context) as client:
            assert client.post("/v1/completions", json=STREAM).status_code == 503


@needs_openssl
def test_handshakes_that_are_reset_leave_nothing(files: Path) -> None:
    """asyncio tells nobody of them, and each took a place for ever."""
    names = tls(files, certfile="cert.pem", keyfile="key.pem")
    with running(max_connections=5, **names) as server:  # type: ignore[arg-type]
        host, port = server.url.removeprefix("https://").split(":")
        for _ in range(20):
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # of a greeting
                time.sleep(0.01)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        context = ssl._create_unverified_context()
        with httpx.Client(base_url=server.url, verify=context, timeout=10) as client:
            assert client.post("/v1/completions", json=STREAM).status_code == 200


@needs_openssl
def test_a_handshake_that_takes_too_long_gives_its_place_back(files: Path) -> None:
    names = tls(files, certfile="cert.pem", keyfile="key.pem")
    with running(max_connections=1, head_timeout_s=0.5, **names) as server:  # type: ignore[arg-type]
        host, port = server.url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            assert silent.recv(100) == b""
        context = ssl._create_unverified_context()
        with httpx.Client(base_url=server.url, verify=context, timeout=10) as client:
            assert client.post("/v1/completions", json=STREAM).status_code == 200


@needs_openssl
@pytest.mark.parametrize("request_sent", [b"", LAST_LIVE, LIVE])
def test_tls_does_not_wait_for_a_farewell(files: Path, request_sent: bytes) -> None:
    """For 30 s such a connection was open, and held up the stop of the server."""
    names = tls(files, certfile="cert.pem", keyfile="key.pem")
    with running(head_timeout_s=0.5, keep_alive_timeout_s=0.5, **names) as server:  # type: ignore[arg-type]
        host, port = server.url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            under = raw.dup()
            with under, ssl._create_unverified_context().wrap_socket(raw) as client:
                client.sendall(request_sent)
                while client.recv(65536):
                    pass
                under.settimeout(10)
                assert under.recv(100) == b""


@needs_openssl
def test_what_comes_with_the_end_of_the_handshake_is_answered_in_tls(files: Path) -> None:
    with running(**tls(files, certfile="cert.pem", keyfile="key.pem")) as server:
        host, port = server.url.removeprefix("https://").split(":")
        for request, status in ((LAST_LIVE, b"200"), (b"nonsense\r\n\r\n", b"400")):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = ssl._create_unverified_context().wrap_bio(incoming, outgoing)
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                for done in (False, True):
                    try:
                        client.do_handshake()
                    except ssl.SSLWantReadError:
                        assert not done
                        raw.sendall(outgoing.read())
                        incoming.write(raw.recv(65536))
                client.write(request)
                raw.sendall(outgoing.read())  # the handshake's last message and the request at once
                answer = b""
                while not answer.startswith(b"HTTP/1.1 " + status):
                    incoming.write(raw.recv(65536))
                    with suppress(ssl.SSLWantReadError):
                        answer += client.read(65536)


@needs_openssl
def test_what_is_no_handshake_is_closed(files: Path) -> None:
    with running(**tls(files, certfile="cert.pem", keyfile="key.pem")) as server:
        host, port = server.url.removeprefix("https://").split(":")
        for said in (LAST_LIVE, b"\x16\x03\x01\x00\x05hello"):
            with socket.create_connection((host, int(port)), timeout=10) as raw, suppress(ConnectionError):
                raw.sendall(said)
                while raw.recv(1000):
                    pass
        context = ssl._create_unverified_context()
        with httpx.Client(base_url=server.url, verify=context) as client:
            assert client.get("/live").status_code == 200


@needs_openssl
def test_clients_may_have_to_show_a_certificate(files: Path) -> None:
    names = tls(files, certfile="cert.pem", keyfile="key.pem", ca_certs="cert.pem")
    with running(**names) as server:
        context = ssl.create_default_context(cafile=str(files / "cert.pem"))
        with httpx.Client(base_url=server.url, verify=context) as client, pytest.raises(httpx.TransportError):
            client.get("/live")
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        with httpx.Client(base_url=server.url, verify=context) as client:
            assert client.get("/live").status_code == 200


@needs_openssl
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"certfile": "absent.pem"}, "ssl_certfile {}absent.pem: No such file or directory"),
        ({"certfile": ""}, "ssl_certfile {}: Is a directory"),
        ({"certfile": "text.pem", "keyfile": "key.pem"}, "ssl_certfile {}text.pem: it holds no certificate"),
        ({"certfile": "cert.pem", "keyfile": "absent"}, "ssl_keyfile {}absent: No such file or directory"),
        ({"certfile": "cert.pem", "keyfile": "other.pem"}, "ssl_keyfile {}other.pem: its key is not that of"),
        ({"certfile": "cert.pem", "keyfile": "text.pem"}, "ssl_keyfile {}text.pem: it holds no key"),
        (
            {"certfile": "cert.pem", "keyfile": "locked.pem"},
            "ssl_keyfile {}locked.pem: it holds no key, or ssl_",
        ),
        ({"certfile": "cert.pem"}, "ssl_certfile {}cert.pem: it holds no key"),
        ({"keyfile": "key.pem"}, "ssl_keyfile needs ssl_certfile"),
        ({"ca_certs": "cert.pem"}, "ssl_ca_certs needs ssl_certfile"),
        (
            {"certfile": "both.pem", "ca_certs": "text.pem"},
            "ssl_ca_certs {}text.pem: it holds no certificate",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(files: Path, names: dict[str, str], message: str) -> None:
    with pytest.raises(TlsError) as caught:
        tls_context(ServerConfig(**tls(files, **names)))  # type: ignore[arg-type]
    assert str(caught.value).startswith(message.format(f"{files}{os.sep}").replace(f"{os.sep}:", ":"))
    assert "\n" not in str(caught.value)


def test_no_files_no_tls() -> None:
    assert tls_context(ServerConfig()) is None


# Unix sockets


def unix_client(path: Path, **options: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://octavo", **options)


def test_requests_over_a_unix_socket_which_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    with running(FakeEngine(step_s=0.002), uds=str(path)) as server:
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with unix_client(path) as client:
            assert client.get("/live").status_code == 200
            assert client.post("/v1/completions", json=STREAM).text.endswith("data: [DONE]\n\n")
    assert not path.exists()


def test_a_client_that_leaves_a_unix_socket_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    body = b'{"prompt": "x", "max_tokens": 200}'
    with running(FakeEngine(stuck=True), uds=str(path)) as server:
        for shut in (False, True):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            if shut:
                client.shutdown(socket.SHUT_WR)
            within(5, lambda: bool(server.engine.live))
            time.sleep(0.3)
            assert server.engine.live
            client.close()
            within(5, lambda: not server.engine.live)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = bind_unix(str(path))
    assert is_loopback(listener)
    assert url_of(listener) == f"unix:{path}"
    with pytest.raises(OSError, match="Address already in use"):
        bind_unix(str(path))
    assert path.exists()
    listener.close()
    listener.close()
    assert not path.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        bind_unix(str(path))
    assert path.read_text() == "precious"


def test_another_servers_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    first = bind_unix(str(path))
    path.unlink()
    second = bind_unix(str(path))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        bind_unix(str(tmp_path / ("x" * 200)))
