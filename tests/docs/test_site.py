"""The built site in a browser: every page, wide and on a phone, in light and in dark.

COORDCONV_SITE names the folder that sphinx-build wrote, as in tox's ``docs`` environment.
"""

import inspect
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from coordconv.backends import BACKENDS

sync_api = pytest.importorskip("playwright.sync_api")

SITE = Path(os.environ.get("COORDCONV_SITE", "no site"))
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if path.relative_to(SITE).parts[0] != "_static"
)
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
VIEWS = [(size, scheme) for size in (PHONE, WIDE) for scheme in ("light", "dark")]

# No sandbox, as root has none; the rest keeps the browser from looking for anything by itself.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What a reader would see go wrong, as the browser has laid it out.
FAULTS = """() => {
    const faults = []
    const root = document.documentElement, content = document.querySelector('.content')
    const name = it => it.outerHTML.slice(0, 100)
    const fits = it => it.getBoundingClientRect().right <= root.clientWidth + 1
    const scrolls = it => ['auto', 'scroll'].includes(getComputedStyle(it).overflowX)
    const boxed = it => it !== content && (scrolls(it) ? fits(it) : boxed(it.parentElement))
    for (const it of [root, content])
        if (it.scrollWidth > it.clientWidth) faults.push('the page scrolls sideways')
    for (const it of content.querySelectorAll('table, pre, img, svg, dt, h1, h2, h3, p, li'))
        if (!fits(it) && !boxed(it)) faults.push('too wide: ' + name(it))
    for (const it of document.images)
        if (!it.complete || it.naturalWidth === 0) faults.push('not loaded: ' + name(it))
    for (const it of document.querySelectorAll('svg.house text'))
        if (it.getBoundingClientRect().height < 11) faults.push('too small to read: ' + name(it))
    return faults
}"""

# How bright the paper and the ink of a page are, from 0 to 255.
BRIGHTNESS = """() => {
    const brightness = colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + b / 3, 0)
    const style = getComputedStyle(document.body)
    return [brightness(style.backgroundColor), brightness(style.color)]
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served."""
    if not SITE.is_dir():
        message = "COORDCONV_SITE names no built site; tox -e docs builds one"
        promised = "browser" in os.environ.get("COORDCONV_REQUIRE", "").split(",")
        (pytest.fail if promised else pytest.skip)(message)
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Quiet(*args, directory=str(SITE))
    ) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def views(address, browser):
    """A tab of the browser for each size and scheme of colours."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        yield [
            Tab(chromium.new_context(viewport=size, color_scheme=scheme).new_page(), address)
            for size, scheme in VIEWS
        ]
        chromium.close()


class Tab:
    """A tab that remembers all that went wrong in it."""

    def __init__(self, page, address):
        self.page, self.address, self.faults = page, address, []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("requestfailed", self._on_failure)
        page.on("request", self._on_request)
        page.on("response", self._on_response)

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _on_request(self, request):
        if not request.url.startswith((self.address, "data:")):
            self.faults.append(f"asks another host: {request.url}")

    def _on_failure(self, request):
        if request.failure != "net::ERR_ABORTED":  # else the page was left before it came
            self.faults.append(f"failed: {request.url}, {request.failure}")

    def _on_response(self, response):
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")

    def open(self, path):
        self.faults.clear()
        self.page.goto(self.address + path, wait_until="load")
        return self.page


class Ids(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name == "id"}


@cache
def ids(page: Path) -> set[str]:
    return Ids(page.read_text(encoding="utf-8")).found


def broken(link: str, address: str) -> str:
    """What is wrong with a link; those to other hosts are not followed."""
    if not link.startswith(address):
        parts = urlsplit(link)
        good = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if good else f"no https address: {link}"
    path, anchor = urldefrag(link.removeprefix(address))
    target = SITE / unquote(urlsplit(path).path or "index.html")
    if not target.is_file():
        return f"no page: {link}"
    if anchor and target.suffix == ".html" and unquote(anchor) not in ids(target):
        return f"no such place: {link}"
    return ""


@pytest.mark.parametrize("path", PAGES or ["every page"])
def test_page(path, address, views, record_property):
    faults = []
    for tab, (size, scheme) in zip(views, VIEWS, strict=True):
        page = tab.open(path)
        where = f"{size['width']} {scheme}"
        faults += [f"{where}: {fault}" for fault in (*tab.faults, *page.evaluate(FAULTS))]
        paper, ink = page.evaluate(BRIGHTNESS)
        if (paper > ink) != (scheme == "light") or abs(paper - ink) < 120:
            faults.append(f"{where}: paper of {paper} and ink of {ink}")
    links = page.evaluate("() => [...document.links].map(link => link.href)")
    faults += filter(None, (broken(link, address) for link in links))
    assert not faults, "\n".join(faults)
    record_property("pages", 1)
    record_property("links", len(links))


def test_every_page_is_in_the_contents():
    """From the front page's list of contents each page can be reached, but for Sphinx's own."""
    if not PAGES:
        pytest.skip("there is no site")
    front = (SITE / "index.html").read_text(encoding="utf-8")
    tree = front.split('class="sidebar-tree"')[1].split("</aside>")[0]
    listed = {urldefrag(link)[0] for link in re.findall(r'href="([^"]*)"', tree)}
    own = {"index.html", "search.html"}
    assert set(PAGES) - own == {link for link in listed if link}


@pytest.mark.parametrize("name", ["", ".weights", ".parity", *(f".backends.{b}" for b in BACKENDS)])
def test_every_public_name_is_in_the_reference(name):
    if not PAGES:
        pytest.skip("there is no site")
    _, _, _, _, packed = (SITE / "objects.inv").read_bytes().split(b"\n", 4)
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    package = pytest.importorskip(f"coordconv{name}")
    elsewhere = {"COMPILED"}  # a flag, which the protocol of a backend describes
    elsewhere |= {"load_weights", "save_weights"} if name == ".weights" else set()
    assert {f"coordconv{name}.{each}" for each in set(package.__all__) - elsewhere} <= listed


@pytest.mark.parametrize("name", BACKENDS)
def test_functions_are_shown_with_all_of_their_arguments(name):
    if not PAGES:
        pytest.skip("there is no site")
    package = pytest.importorskip(f"coordconv.backends.{name}")
    page = (SITE / f"api/{name}.html").read_text(encoding="utf-8")
    functions = {n: getattr(package, n) for n in package.__all__}
    functions = {n: each for n, each in functions.items() if inspect.isroutine(each)}
    assert {"add_coords", "fuse", "recorded"} <= {*functions}
    for each, function in functions.items():
        _, found = page.split(f'id="coordconv.backends.{name}.{each}">')
        arguments = found.split("</dt>")[0].split('<em class="sig-param">')[1:]
        shown = [re.search(r'class="n"><span class="pre">(\w+)', one) for one in arguments]
        wanted = [*inspect.signature(function).parameters]
        assert [found[1] for found in shown if found] == wanted, each  # no name has the lone *


@pytest.mark.parametrize("word", ["windows", "fuse", "CoordConv2d", "quantize", "paddledetection"])
def test_search(word, views):
    tab = views[2]  # a wide one, where the field is not in a drawer
    page = tab.open("index.html")
    page.locator(".sidebar-search").first.fill(word)
    page.locator(".sidebar-search").first.press("Enter")
    result = page.locator("#search-results li a").first
    result.wait_for()
    page.wait_for_load_state("networkidle")  # it quotes the pages that it found
    result.click()
    page.wait_for_load_state("load")
    assert "search.html" not in page.url
    assert word.lower() in page.locator("article").inner_text().lower()
    assert not tab.faults


def test_a_framework_is_chosen_once(views):
    """All tabs of a page follow, and the page remembers it."""
    page = views[0].open("start.html")
    chosen = "[...document.querySelectorAll('.sd-tab-set > input:checked + label')]"
    shown = f"() => {chosen}.map(label => label.innerText)"
    sets = page.locator(".sd-tab-set").count()
    assert sets >= 3
    assert page.evaluate(shown) == ["PyTorch"] * sets
    for framework in ("Linen", "Paddle"):
        page.get_by_text(framework, exact=True).nth(1).click()
        assert page.evaluate(shown) == [framework] * sets
    page.reload()
    assert page.evaluate(shown) == ["Paddle"] * sets
    assert "paddle.randn" in page.locator("article").inner_text()
    assert not views[0].faults


def test_what_would_go_wrong_is_found(views, address):
    """The checks above, on a page that has one of each fault."""
    tab = views[0]
    page = tab.open("index.html")
    page.evaluate(
        """() => {
            console.error('on purpose')
            document.querySelector('article').innerHTML +=
                '<pre style="width: 900px; overflow: visible">wide</pre>' +
                '<img alt="none" src="none.png"><img alt="elsewhere" src="https://example.invalid/a.png">'
        }"""
    )
    page.wait_for_load_state("networkidle")
    said = " ".join([*tab.faults, *page.evaluate(FAULTS)])
    for fault in (
        "console: on purpose",
        "404: ",
        "asks another host: https://example.invalid",
        "scrolls sideways",
        "too wide: <pre",
        'not loaded: <img alt="none"',
    ):
        assert fault in said, fault
    for link in ("http://example.org/", f"{address}none.html", f"{address}index.html#none"):
        assert broken(link, address)
    assert not broken(f"{address}start.html#install", address)
