"""The live page at `GET /`, and the files that it consists of."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final, NamedTuple

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from streamworker.gateway.gateway import Gateway

__all__ = ["CONTENT_SECURITY_POLICY", "PageFile", "load_page", "routes"]

CONTENT_SECURITY_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
"""The page may run its own scripts only, connect to its own origin only, and turn no text into markup."""

_INDEX: Final = "index.html"
_TYPES: Final = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
_FOREVER: Final = "public, max-age=31536000, immutable"


class PageFile(NamedTuple):
    """A file of the page."""

    body: bytes
    content_type: str
    etag: str


def load_page() -> tuple[str, dict[str, PageFile]]:
    """Read the page's files; return their common version and the files by name.

    The version is part of the address of every file, so that browsers may keep the files forever.
    """
    folder = files("streamworker.gateway") / "page"
    bodies = {
        entry.name: entry.read_bytes() for entry in folder.iterdir() if _extension(entry.name) in _TYPES
    }
    names = sorted(bodies)
    version = hashlib.sha256(b"\0".join(name.encode() + b"\0" + bodies[name] for name in names)).hexdigest()[
        :12
    ]
    bodies[_INDEX] = bodies[_INDEX].replace(b'="page/', f'="page/{version}/'.encode())
    return version, {name: _file(name, body) for name, body in bodies.items()}


def _file(name: str, body: bytes) -> PageFile:
    etag = hashlib.sha256(body).hexdigest()[:16]
    return PageFile(body, _TYPES[_extension(name)], etag)


def _extension(name: str) -> str:
    return name.rpartition(".")[2]


def routes(_gateway: Gateway | None = None) -> list[web.RouteDef]:
    """Return the routes of the page. They need no identity."""
    page = _Page()
    return [web.get("/", page.index), web.get("/page/{version}/{name}", page.file)]


class _Page:
    def __init__(self) -> None:
        self._version, self._files = load_page()

    async def index(self, request: web.Request) -> web.Response:
        """Answer with the document. It is small, and names the version of all other files: it is not stored."""
        return _response(request, self._files[_INDEX], "no-store")

    async def file(self, request: web.Request) -> web.Response:
        """Answer with a file. While two versions are deployed, a document of one may ask a replica of the other."""
        found = self._files.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        is_current = request.match_info["version"] == self._version
        return _response(request, found, _FOREVER if is_current else "no-store")


def _response(request: web.Request, file: PageFile, cache_control: str) -> web.Response:
    headers = {
        hdrs.CACHE_CONTROL: cache_control,
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    known = request.if_none_match or ()
    if any(tag.value in {file.etag, "*"} for tag in known):
        response = web.Response(status=304, headers=headers)
    else:
        response = web.Response(
            body=file.body, content_type=file.content_type, charset="utf-8", headers=headers
        )
    response.etag = file.etag
    return response
