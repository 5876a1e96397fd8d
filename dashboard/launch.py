"""Start the dashboard in this process: loopback, no usage statistics, no foreign Host, errors without internals."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path

FIRST_PORT = 8501
PORTS_TRIED = 100


def run(
    model: str | Sequence[str] | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    prompt: str | None = None,
) -> None:
    """Serve the dashboard on ``model`` until interrupted.

    ``model`` is what ``headwater.load`` takes by name, or the file of a saved record or corpus, or several of these,
    of which the first is shown first; each is opened before the server starts, so that a wrong name is an error here.
    Without a model or record it is smollm2-135m, or tasks-4l where that was not added. Pages offer these, the embedded
    models and the added ones, no others; it begins with ``prompt``. A taken ``port`` gives way to the next free one.
    Only a loopback ``host`` is private; any other is served with a printed warning.
    """
    import streamlit  # noqa: F401 - a missing extra is told before a model is loaded

    from headwater.dashboard.running import models
    from headwater.dashboard.state import corpora

    given = [model] if isinstance(model, str) else list(model or ())
    for each in filter(corpora.is_one, given):
        corpora.offer(each)
    given = [each for each in given if not corpora.is_one(each)]
    if not given:
        models.open_first()
    for each in reversed(given):  # the last to be allowed is shown first
        name = models.allow(each)[0]
        models.record(name) if models.is_record(name) else models.resident(name)
    models.begin_with(prompt)
    if not is_loopback(host):
        print(
            f"Warning: {host} lets everyone who reaches this machine read prompts and run the model.",
            file=sys.stderr,
        )
    free = FIRST_PORT if port is None else port
    while True:
        free = free_port(host, free)
        if port is not None and free != port:
            print(f"Port {port} is taken; using {free}.", flush=True)
        try:
            _application(host, address(host, free), open_browser).run(config=configuration(host, free))
            return
        except SystemExit:
            if free_port(host, free) == free:
                raise
            free += 1  # another dashboard took it after we had looked


def address(host: str, port: int) -> str:
    """Where a browser finds the dashboard."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, first: int) -> int:
    """The first port from ``first`` on that ``host`` can listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    from headwater.lens.errors import HeadwaterError

    last = min(first + PORTS_TRIED, 65536) - 1
    raise HeadwaterError(
        f"no free port from {first} to {last} on {host}: give another with --port, or another --host"
    )


def served_names(host: str) -> list[str]:
    """Host names a browser may use. Any other is refused, which stops pages of other sites reaching the server."""
    names = ["127.0.0.1", "localhost"]
    if host not in ("0.0.0.0", "::"):
        return list(dict.fromkeys([*names, host, *([f"[{host}]"] if ":" in host else [])]))
    import psutil

    own = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    ]
    return list(dict.fromkeys([*names, socket.gethostname(), *own]))


def configuration(host: str, port: int) -> dict[str, object]:
    return {
        "server.address": host,
        "server.port": port,
        "server.headless": True,  # otherwise the first start asks for an e-mail address
        "server.allowedHosts": served_names(host),
        "server.fileWatcherType": "none",
        "runner.postScriptGC": False,  # all objects of all sessions after each run; see running/held.py
        "server.maxUploadSize": 16,  # megabytes: pictures and experiments
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "viewer",
        # each half of the theme by itself: with a colour for both, light is taken whatever the system prefers
        "theme.light.primaryColor": "#1f6f8b",
        "theme.dark.primaryColor": "#5fb4cf",
        "client.showErrorDetails": "none",
        "logger.level": "warning",  # not each progress bar that has gone
        "logger.hideWelcomeMessage": True,  # it would ask an outside service for the public address
    }


def _application(host: str, url: str, open_browser: bool):
    import streamlit as st
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    @asynccontextmanager
    async def announce(application):
        print(f"Headwater is open at {url} (Ctrl-C ends it)", flush=True)
        if open_browser:
            threading.Timer(1.0, webbrowser.open, [url]).start()
        yield {}

    return st.App(
        Path(__file__).with_name("app.py"),
        lifespan=announce,
        on_script_error=tell,
        middleware=[
            # Streamlit's allowedHosts guards only the WebSocket; this guards the pages as well
            Middleware(TrustedHostMiddleware, allowed_hosts=served_names(host), www_redirect=False),
            Middleware(PrivateHeaders),
        ],
    )


def tell(error: Exception) -> bool:
    """Log a fault that nobody foresaw, and show where to find it instead of its insides."""
    import streamlit as st

    name = secrets.token_hex(3)
    logging.getLogger("headwater.dashboard").error("fault %s", name, exc_info=error)
    st.error(
        f"Headwater met a fault that it did not foresee. The terminal that runs it tells more, under fault {name}."
    )
    return True  # keeps Streamlit from showing its own message, which offers to send it to search engines


class PrivateHeaders:
    """Keeps prompts, which stand in the address, out of Referer headers, and the pages out of foreign frames."""

    HEADERS = (
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
        (b"x-content-type-options", b"nosniff"),
    )

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
