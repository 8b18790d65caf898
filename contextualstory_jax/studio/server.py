"""The web server: one login before every route, and nothing for other sites."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from contextualstory_jax.studio.limits import MOST_BYTES, MOST_OF_BODY, TOO_LARGE
from contextualstory_jax.utils.errors import UserError, require

if TYPE_CHECKING:
    from contextualstory_jax.studio.studio import Studio

INSTALL = "the studio needs Gradio: pip install 'contextualstory-jax[studio]'"
# Routes of Gradio that the studio does without: other sites' files, and those of developers.
CLOSED = re.compile(
    r"/(gradio_api/)?(proxy=|vibe-|dev/|monitoring|profiling|process_recording|run-history"
    r"|custom_component|deep_link|stream/)|/(login|logout)"
)
HEADERS = {
    "Content-Security-Policy": (
        # Gradio's page compiles its templates, and its parts load each other.
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
        "base-uri 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses requests before any route sees them."""

    def __init__(self, app: Any, host: str, password: str | None):
        """Guard an app.

        Args:
            app: the ASGI app.
            host: address that the server listens at.
            password: of the login, any user; None for none.
        """
        self.app, self.password = app, password
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.anywhere = not is_local(host)
        if self.anywhere:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        refused = self._refuse(scope["path"], headers)
        if refused is not None:
            await answer(send, *refused)
            return
        await self._serve(scope, receive, send)

    def _refuse(
        self, path: str, headers: dict[str, bytes]
    ) -> tuple[int, str, dict[str, str]] | None:
        """Status, message and headers for a request that is not answered; None for others."""
        host = headers.get("host", b"").decode("latin-1")
        if not self._is_ours(host):
            return 403, "this server does not go by that name; use the address it printed", {}
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return 403, "requests from other sites are refused; open the studio's own page", {}
        if not self._knows(headers.get("authorization", b"")):
            challenge = {"WWW-Authenticate": 'Basic realm="studio", charset="UTF-8"'}
            return 401, "log in with the studio's password, and any user name", challenge
        if int_of(headers.get("content-length", b"0")) > MOST_OF_BODY:
            return 413, TOO_LARGE, {}
        if CLOSED.match(path):
            return 404, "there is nothing here", {}
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if self.anywhere:  # a name may be made to mean any address, an address may not
            try:
                ipaddress.ip_address(name)
                return True
            except ValueError:
                pass
        return name in self.names

    def _knows(self, authorization: bytes) -> bool:
        if self.password is None:
            return True
        kind, _, encoded = authorization.partition(b" ")
        try:
            given = base64.b64decode(encoded, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
        return kind.lower() == b"basic" and hmac.compare_digest(given, self.password.encode())

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        size, started = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return {"type": "http.disconnect"} if size > MOST_OF_BODY else message

        async def with_headers(message: Message) -> None:
            nonlocal started
            if size > MOST_OF_BODY:
                return  # the app may say anything about half a body
            if message["type"] == "http.response.start":
                started = True
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                extra = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message["headers"] = given + [pair for pair in extra if pair[0] not in names]
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except Exception:
            if size <= MOST_OF_BODY:
                raise
        if size > MOST_OF_BODY and not started:
            await answer(send, 413, TOO_LARGE, {})


def int_of(value: bytes) -> int:
    """A header's number; 0 for what is none."""
    return int(value) if value.isdigit() else 0


async def answer(send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    """Answer with one line of text."""
    fields = {"Content-Type": "text/plain; charset=utf-8", **HEADERS, **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": f"{message}\n".encode()})


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, password: str | None) -> None:
    """Raise `UserError` where others could reach the studio without a login."""
    require(password != "", "--password is empty; choose one, or leave it out")
    require(
        is_local(host) or password is not None,
        f"--host {host} lets others in; give --password as well",
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `UserError` where it is taken or is none of this machine."""
    require(0 <= port < 2**16, f"--port must be in 0..65535; got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen at {host}, port {port}: {reason}; choose another --port or --host"
        ) from error
    return found


def import_gradio() -> None:
    """Import Gradio so that it sends nothing. Raises `UserError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(INSTALL) from error
    logging.getLogger("httpx").setLevel(logging.WARNING)


def make_app(studio: Studio, host: str, password: str | None) -> Any:
    """The ASGI app: Gradio's page and endpoints behind the guard."""
    import_gradio()
    import fastapi
    import gradio

    from contextualstory_jax.studio import html
    from contextualstory_jax.studio.page import Page

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        app,
        Page(studio).blocks,
        "/",
        server_name=host,
        footer_links=["api"],
        run_history=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        css=html.CSS,
    )
    return Guard(app, host, password)


def serve(studio: Studio, sock: socket.socket, host: str, password: str | None) -> None:
    """Serve until the process is ended."""
    import_gradio()
    import uvicorn

    app = make_app(studio, host, password)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=2, server_header=False
    )
    uvicorn.Server(config).run(sockets=[sock])


def links(studio: Studio, sock: socket.socket, host: str) -> list[str]:
    """The addresses of the page and of all stories."""
    port = sock.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    base = f"http://{name}:{port}/"
    found = [f"{base}?story={project.link}" for project in studio.projects.all()]
    return [base, *found]
