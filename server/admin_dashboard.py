"""The dashboard page on the admin port: files that hold no data, so they need no key."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import Response

PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Scripts and styles are files of our own, nothing is inline, and nothing leaves for elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def dashboard_files() -> dict[str, bytes]:
    """The page's files by the path that they have on the port."""
    folder = resources.files("liveprune.server.dashboard")
    found = {
        f"/dashboard/{file.name}": file.read_bytes()
        for file in folder.iterdir()
        if _suffix(file.name) in _TYPES and file.name != PAGE
    }
    page = folder.joinpath(PAGE).read_bytes()
    return {"/": page, "/dashboard/": page, **found}


def add_dashboard(app: FastAPI) -> frozenset[str]:
    """Serve the page.

    Returns:
        Its paths, which need no key.
    """
    files = dashboard_files()
    for path, content in files.items():
        app.add_route(path, _route(path, content), methods=["GET"], include_in_schema=False)
    return frozenset(files)


def _route(path: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}
    kind = _TYPES[_suffix(path)] if _suffix(path) else _TYPES[".html"]

    async def serve(request: Request) -> Response:
        held = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in held:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return serve


def _suffix(name: str) -> str:
    return name[name.rfind(".") :] if "." in name else ""
