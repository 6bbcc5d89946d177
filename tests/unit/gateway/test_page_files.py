"""The files of the page: how they are served, and what they may not contain."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from streamworker.gateway.page_files import CONTENT_SECURITY_POLICY, load_page, routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = files("streamworker.gateway") / "page"
SOURCES = {entry.name: entry.read_text() for entry in PAGE.iterdir()}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
MAX_BYTES = 60 * 1024


@pytest.fixture
async def http() -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """A client of a server that has the page's routes alone."""
    app = web.Application()
    app.add_routes(routes())
    async with TestClient(TestServer(app)) as client:
        yield client


# Serving


async def test_page_document_is_not_stored_and_names_versioned_files(
    http: TestClient[web.Request, web.Application],
) -> None:
    """The document is asked for each time; the addresses of its files change with their contents."""
    answer = await http.get("/")
    text = await answer.text()
    version, _ = load_page()

    assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(re.findall(r'(?:src|href)="(page/[^"]*)"', text)) == {
        f"page/{version}/{name}" for name in ("icon.svg", "style.css", "main.js")
    }


@pytest.mark.parametrize("name", sorted(SOURCES))
async def test_page_file_of_the_current_version_is_kept_forever(
    http: TestClient[web.Request, web.Application], name: str
) -> None:
    """Each file has its type, a policy, and an entity tag that saves its body."""
    version, _ = load_page()
    answer = await http.get(f"/page/{version}/{name}")
    kept = await http.get(f"/page/{version}/{name}", headers={"If-None-Match": answer.headers["ETag"]})
    types = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}

    assert (answer.status, answer.content_type) == (200, types[name.rpartition(".")[2]])
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert (kept.status, await kept.read()) == (304, b"")


async def test_page_file_of_another_version_is_served_and_not_stored(
    http: TestClient[web.Request, web.Application],
) -> None:
    """While two versions are deployed, a document of one may ask a replica of the other."""
    answer = await http.get("/page/000000000000/main.js")

    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert await answer.text() == SOURCES["main.js"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/v/none.js",
        "/page/v/__init__.py",
        "/page/v/%2e%2e%2fauth.py",
        "/page/v/..%2F..%2Fpyproject.toml",
        "/page/v/",
        "/page/",
        "/page/v/x/main.js",
        "/index.html",
        "/page/v/main.js%00",
    ],
)
async def test_page_has_no_other_files(http: TestClient[web.Request, web.Application], path: str) -> None:
    """A path that names no file of the page is not found, whatever is in the file system."""
    assert (await http.get(path)).status == 404


@pytest.mark.parametrize("tag", ['"other"', 'W/"other"', '""', '"a", "b"'])
async def test_page_file_with_another_tag_is_sent_whole(
    http: TestClient[web.Request, web.Application], tag: str
) -> None:
    """A tag of another version does not save the body."""
    answer = await http.get("/page/v/main.js", headers={"If-None-Match": tag})

    assert (answer.status, await answer.text()) == (200, SOURCES["main.js"])


# Contents


def test_page_is_small() -> None:
    """The page has under 60 KiB, unpacked and with its comments."""
    assert sum(len(text.encode()) for text in SOURCES.values()) < MAX_BYTES


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_page_file_names_no_other_host(name: str) -> None:
    """Nothing comes from a third party. The SVG namespace is a name, not an address."""
    text = SOURCES[name].replace("http://www.w3.org/2000/svg", "")

    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", text) == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_page_script_makes_no_markup_of_text(name: str) -> None:
    """A model's text is text: no script parses markup or evaluates code."""
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage|\.cookie"
    )

    assert re.findall(banned, SCRIPTS[name]) == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_page_script_imports_files_that_exist(name: str) -> None:
    """Each import names a file of the page and names that it exports."""
    for names, module in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', SCRIPTS[name]):
        exported = set(re.findall(r"export (?:async )?(?:function|class|const) ([\w$]+)", SOURCES[module]))
        assert {part.strip() for part in names.split(",")} <= exported


def test_page_document_has_no_inline_code_or_style() -> None:
    """The policy would block both."""
    assert (
        re.findall(
            r"<script(?! type=\"module\" src)|<style|\son\w+=|\sstyle=|javascript:", SOURCES["index.html"]
        )
        == []
    )


def test_page_policy_allows_the_own_origin_only() -> None:
    """Every directive is 'none' or 'self', and text cannot become markup."""
    policy = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))

    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}


def test_page_uses_ids_and_classes_that_exist() -> None:
    """Every id that scripts look up is in the document."""
    document = SOURCES["index.html"]
    wanted = {
        found
        for text in SCRIPTS.values()
        for found in re.findall(r'(?:\$|byId|getElementById|setText\(byId|on|clone)\("([a-z-]+)"', text)
    } - {"keydown"}

    assert len(wanted) > 20
    assert [name for name in wanted if f'id="{name}"' not in document] == []


# Colours


def _scheme(dark: bool) -> dict[str, str]:
    pairs = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", SOURCES["style.css"])
    return {name: night if dark else light for name, light, night in pairs}


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2.2."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_defines_it() -> None:
    """Black on white has 21, and #777 on white just misses AA."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


TEXTS = ("text", "dim", "accent", "done", "broken", "failed")
GROUNDS = ("ground", "surface", "raised")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), list(itertools.product(TEXTS, GROUNDS)))
def test_page_text_has_enough_contrast(text: str, ground: str, dark: bool) -> None:
    """Every colour of text has the contrast of WCAG AA, 4.5, on every ground, in both schemes."""
    colours = _scheme(dark)

    assert contrast(colours[text], colours[ground]) >= 4.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_button_has_enough_contrast(dark: bool) -> None:
    """The text of the main button has the contrast of WCAG AA."""
    colours = _scheme(dark)

    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def test_page_names_each_colour_once() -> None:
    """Outside the two schemes, colours are named, not written."""
    rest = re.sub(r":root \{.*?\}", "", SOURCES["style.css"], flags=re.DOTALL)

    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rest) == []


def test_page_moves_only_where_motion_is_welcome() -> None:
    """Animations and transitions are inside the query for readers who did not ask for less motion."""
    outside = re.sub(
        r"@media \(prefers-reduced-motion: no-preference\) \{.*?\n\}",
        "",
        SOURCES["style.css"],
        flags=re.DOTALL,
    )

    assert re.findall(r"animation|transition|@keyframes", outside) == []
