"""The listening socket, and TLS. Both are taken before anything costs, and this imports nothing that does."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

    from server.config import ServerConfig

BACKLOG = 2048
MAX_UNSENT_BYTES = 128 * 2**10  # that the kernel keeps for a client which does not read
CONNECT_TIMEOUT_S = 1.0
NOT_OTHERS = 0o117  # umask of a Unix socket: its user and group may connect


class TlsError(Exception):
    """The files of TLS cannot be used. One line that names the setting."""


def listen(config: ServerConfig) -> socket.socket:
    """Raises OSError."""
    return bind_unix(config.uds) if config.uds else bind(config.host, config.port)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class UnixListener(socket.socket):
    """Its path goes when it is closed, unless another server has taken that since."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = os.path.abspath(path)
        self._identity: tuple[int, int] | None = None

    def start(self) -> None:
        """Raises OSError."""
        _remove_stale(self._path)
        mask = os.umask(NOT_OTHERS)  # from the first moment on, which a chmod would not do
        try:
            self.bind(self._path)
        finally:
            os.umask(mask)
        self._identity = _identity(self._path)
        self.listen(BACKLOG)

    def close(self) -> None:
        if self._identity is not None and _identity(self._path) == self._identity:
            os.unlink(self._path)
        self._identity = None
        super().close()


def bind_unix(path: str) -> socket.socket:
    """A listening socket on a path, in place of one there that nobody listens on. Raises OSError."""
    listener = UnixListener(path)
    try:
        listener.start()
    except OSError:
        listener.close()
        raise
    return listener


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise OSError(errno.EEXIST, "the file is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(CONNECT_TIMEOUT_S)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass  # it listens, and is busy
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises TlsError."""
    if not config.ssl_certfile:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(config, name):
                raise TlsError(f"{name} needs ssl_certfile")
        return None
    import ssl

    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        _check_readable(name, getattr(config, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "ssl_certfile", config.ssl_certfile)
    key = "ssl_keyfile" if config.ssl_keyfile else "ssl_certfile"
    try:
        # As a function: given as text and empty, OpenSSL would ask for it at the terminal.
        context.load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile or None, lambda: config.ssl_keyfile_password
        )
    except (OSError, ValueError) as error:
        cause = (
            f"its key is not that of {config.ssl_certfile}"
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
            else "it holds no key, or ssl_keyfile_password does not open it"
        )
        raise TlsError(f"{key} {getattr(config, key)}: {cause}") from None
    if config.ssl_ca_certs:
        _load_authorities(context, "ssl_ca_certs", config.ssl_ca_certs)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, path: str) -> None:
    if path:
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise TlsError(f"{name} {path}: {error.strerror or error}") from None


def _load_authorities(context: ssl.SSLContext, name: str, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError):
        raise TlsError(f"{name} {path}: it holds no certificate in PEM") from None


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    scheme = "https" if tls else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
