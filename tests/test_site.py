"""Tests of the documents' site, as `make site` builds it: its navigation, its links, and what it loads."""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.conftest import ROOT
from tests.test_web_page import CHROMIUM, FLAGS, PATIENCE

#: Elements that the same Markdown must give on the site and on a code host.
COMPARED = ("h1", "h2", "h3", "h4", "ul", "ol", "li", "table", "tr", "th", "td", "pre", "img", "code", "strong")
#: A page of Zensical's own, for a web server, whose links begin at the host.
NOT_FOUND = "404.html"


class Html(HTMLParser):
    """A page's links, what it loads, the names of its chapters, and how often its text has each element."""

    def __init__(self, text: str, within: str = "") -> None:
        """within: the element that holds the text, or "" for the whole page."""
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.elements: Counter[str] = Counter()
        self._within = within
        self._inside = not within
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self._inside |= tag == self._within
        self.elements[tag] += self._inside
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.links if tag == "a" else self.loaded).append(given["href"])
        self.loaded += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]
        self.loaded += re.findall(r"url\([\"']?([^\"')]+)", given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != self._within


def make_site(folder: Path) -> None:
    """Build the site in a folder."""
    # Without the variables that a make which runs these tests sets for its children.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--assume-old=.venv-dev/.installed", "site", f"SITE={folder}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"open {folder}/html/index.html" in result.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site: the Markdown in ``.pages``, and what was built in ``html``."""
    folder = tmp_path_factory.mktemp("site")
    make_site(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    """The pages that were built, by their paths."""
    html = site / "html"
    return {str(path.relative_to(html)): Html(path.read_text(), "article") for path in html.rglob("*.html")}


def built_from(page: str) -> str:
    """Return the path of the page that is built from a Markdown file."""
    return re.sub(r"(README|index)\.html$", "index.html", page.removesuffix(".md") + ".html")


def destination(page: str, link: str) -> str:
    """Return the path in the site that a link of a page leads to."""
    path = unquote(urlsplit(link).path)
    return os.path.normpath(Path(page).parent / path) if path else page


def is_outside(link: str) -> bool:
    """Return whether a link leaves the site."""
    address = urlsplit(link)
    return bool(address.netloc) or address.scheme not in ("", "data")


def files_of(navigation: list[Any]) -> list[str]:
    """Return the Markdown files that the site's settings name."""
    entries = [entry for one in navigation for entry in one.values()]
    return [file for entry in entries for file in (files_of(entry) if isinstance(entry, list) else [entry])]


def test_every_page_is_once_in_the_navigation(site: Path, pages: dict[str, Html]) -> None:
    markdown = {str(path.relative_to(site / ".pages")) for path in (site / ".pages").rglob("*.md")}
    listing = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"README.md", "docs/operations.md", "docs/claims/README.md"} <= set(listing.stdout.split()) <= markdown
    named = files_of(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    assert sorted(named) == sorted(markdown)
    assert {built_from(page) for page in markdown} <= {
        destination("index.html", link) for link in pages["index.html"].links
    }


def test_every_link_of_the_site_leads_to_a_file_of_it_and_to_a_chapter(site: Path, pages: dict[str, Html]) -> None:
    lost = []
    for page, content in pages.items():
        for link in content.links + content.loaded:
            if page == NOT_FOUND or is_outside(link) or link.startswith("data:"):
                continue
            target, chapter = destination(page, link), unquote(urlsplit(link).fragment)
            known = target not in pages or chapter in ("", "__skip") or chapter in pages[target].names
            if not (site / "html" / target).is_file() or not known:
                lost.append(f"{page}: {link}")
    assert lost == []


def test_no_page_names_a_script_a_style_a_font_or_a_picture_of_another_host(site: Path, pages: dict[str, Html]) -> None:
    assert [(page, one) for page, content in pages.items() for one in content.loaded if is_outside(one)] == []
    for style in (site / "html").rglob("*.css"):
        loaded = re.findall(r"url\([\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", style.read_text())
        assert [one for pair in loaded for one in pair if is_outside(one)] == [], style.name


def test_the_site_has_the_lists_tables_and_blocks_that_a_code_host_shows(site: Path, pages: dict[str, Html]) -> None:
    host = MarkdownIt("commonmark").enable("table")
    for file in (site / ".pages").rglob("*.md"):
        name = str(file.relative_to(site / ".pages"))
        text = re.sub(r"\A---\n.*?^---\n", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)  # a card's fields
        shown, expected = pages[built_from(name)].elements, Html(host.render(text)).elements
        assert {one: shown[one] for one in COMPARED} == {one: expected[one] for one in COMPARED}, name


def test_a_link_to_a_page_or_a_chapter_that_is_not_there_fails_the_build(site: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("zensical")
    shutil.copytree(site, tmp_path, ignore=shutil.ignore_patterns("html"), dirs_exist_ok=True)
    with (tmp_path / ".pages" / "CHANGELOG.md").open("a") as page:
        page.write("\nSee [a page](docs/nowhere.md) and [a chapter](docs/clients.md#nowhere).\n")
    command = [str(program), "build", "--strict", "--config-file", str(tmp_path / "zensical.toml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "page does not exist" in said and "anchor does not exist" in said


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder over HTTP, without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The address of the site on a web server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site / "html"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")
def test_a_browser_loads_all_pages_and_finds_words_without_another_host(address: str, pages: dict[str, Html]) -> None:
    from playwright.sync_api import sync_playwright

    loaded: set[str] = set()
    faults: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = chromium.new_page(viewport={"width": 390, "height": 844})
        opened.set_default_timeout(PATIENCE)
        opened.on("request", lambda request: loaded.add(request.url))
        opened.on("response", lambda answer: faults.append(answer.url) if answer.status >= 400 else None)
        opened.on("pageerror", lambda error: faults.append(str(error)))
        for page in sorted(pages):
            opened.goto(address + page)
            wide = opened.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{page} is wider than a telephone"
        opened.goto(address)
        opened.keyboard.press("/")
        opened.keyboard.type("RESOURCE_EXHAUSTED")
        opened.wait_for_selector("a[href*='operations.html']:visible")
        chromium.close()
    assert faults == []
    assert {url for url in loaded if not url.startswith((address, "data:", "blob:"))} == set()
