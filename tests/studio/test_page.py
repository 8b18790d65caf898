"""The page in a browser: a story is written, generated, changed, exported and opened again."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from contextualstory_jax.studio import server
from tests.helpers.studio import SENTENCES

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SCRIPT = "Mia says <script>document.title = 'bad'</script> ${1+1} {{value}} <b>hi</b>."
WAIT = 15_000  # milliseconds

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH, nor in CHROMIUM"),
]


@pytest.fixture
def address(studio, monkeypatch):
    """The studio's address; connections of the server to elsewhere fail the test."""
    server.import_gradio()
    import uvicorn

    connect, others = socket.socket.connect, []

    def local(sock, target):
        if isinstance(target, tuple) and target[0] not in ("127.0.0.1", "::1", "localhost"):
            others.append(target)
        return connect(sock, target)

    monkeypatch.setattr(socket.socket, "connect", local)
    sock = server.listen("127.0.0.1", 0)
    app = server.make_app(studio, "127.0.0.1", "secret")
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    running.should_exit = True
    thread.join(30)
    assert not others


@pytest.fixture
def page(address):
    """A page of a browser that asks nobody but the studio."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(
            viewport={"width": 1280, "height": 900},
            http_credentials={"username": "me", "password": "secret"},
        )
        page = context.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not errors


def write(page, sentences, steps=2):
    page.get_by_label("Sentences").fill("\n".join(sentences))
    page.get_by_label("Steps").fill(str(steps))


def generate(page):
    page.get_by_role("button", name="Generate", exact=True).click()


def frames(page) -> list[str]:
    page.locator("#status progress").wait_for(state="detached", timeout=WAIT)
    return [image.get_attribute("src") for image in page.locator("#strip img").all()]


def changed(page, before: list[str]) -> list[bool]:
    """Which frames are others than before, once any is."""
    for _ in range(200):
        after = frames(page)
        if len(after) == len(before) and after != before:
            return [a != b for a, b in zip(after, before, strict=True)]
        page.wait_for_timeout(100)
    raise AssertionError("no frame has changed; " + page.locator("#status").inner_text())


def test_a_story_is_written_changed_exported_and_opened_again(page, address, tmp_path):
    write(page, [*SENTENCES[:4], SCRIPT])
    generate(page)
    page.locator("#strip img").nth(4).wait_for(timeout=WAIT)
    first = frames(page)
    assert len(first) == 5 and "story=" in page.url
    alts = [image.get_attribute("alt") for image in page.locator("#strip img").all()]
    assert alts == page.locator("#strip figcaption").all_inner_texts() == [*SENTENCES[:4], SCRIPT]
    assert page.title() == "ContextualStory studio"

    page.get_by_role("button", name="Regenerate frame 3").click()
    assert changed(page, first) == [False, False, True, False, False]
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function(
        "s => document.querySelectorAll('#strip img')[2].src === s", arg=first[2]
    )

    for number in (1, 2, 4):
        page.get_by_label(f"Lock frame {number}", exact=True).check()
    page.get_by_label("Seed").fill("7")
    generate(page)
    assert changed(page, first) == [False, False, True, False, True]
    second = frames(page)

    page.get_by_role("button", name="Candidates for frame 5").click()
    page.get_by_role("button", name="Choose candidate 2").click(timeout=WAIT)
    assert changed(page, second) == [False, False, False, False, True]

    image = tmp_path / "own.png"
    third = frames(page)
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 10, 10)).save(image)
    page.get_by_label("Replace frame 5 by").set_input_files(image)
    assert changed(page, third) == [False, False, False, False, True]

    page.get_by_role("button", name="Export", exact=True).click()
    with page.expect_download() as download:
        page.locator("a[download]").first.click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")

    last = frames(page)
    page.reload()
    page.locator("#strip img").nth(4).wait_for(timeout=WAIT)
    assert frames(page) == last
    assert page.get_by_label("Lock frame 5", exact=True).is_checked()
    assert page.get_by_label("Sentences").input_value().splitlines()[4] == SCRIPT


def test_axe_finds_no_serious_violation(page):
    import axe_playwright_python

    write(page, SENTENCES[:2])
    generate(page)
    page.locator("#strip img").nth(1).wait_for(timeout=WAIT)
    page.get_by_text("StoryFlow:").click()
    page.get_by_text("My stories").click()
    page.locator("#flow input").wait_for()

    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("async () => (await axe.run()).violations")

    assert [v for v in found if v["impact"] in ("serious", "critical")] == []


def test_the_keyboard_is_enough_and_a_phone_wide_enough(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.get_by_label("Sentences").focus()
    page.keyboard.type("Mia sits.\nOtto comes.")
    page.keyboard.press("Tab")

    def tab_to(name: str) -> None:
        for _ in range(80):
            label = page.evaluate(
                "() => { const e = document.activeElement;"
                "return e.getAttribute('aria-label') || e.innerText || ''; }"
            )
            if label.strip() == name:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{name} is not reached")

    tab_to("Generate")
    page.keyboard.press("Enter")
    page.locator("#strip img").nth(1).wait_for(timeout=WAIT)
    before = frames(page)
    tab_to("Lock frame 1")
    page.keyboard.press("Space")
    assert page.get_by_label("Lock frame 1", exact=True).is_checked()
    tab_to("Regenerate frame 2")
    page.keyboard.press("Enter")
    assert changed(page, before) == [False, True]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_story_is_cancelled_and_what_is_wrong_is_said(page):
    write(page, SENTENCES, steps=250)
    generate(page)
    page.locator("#status progress[value]").wait_for(timeout=WAIT)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("cancelled").wait_for(timeout=WAIT)
    assert not frames(page)

    write(page, ["a" * 10_000])
    generate(page)
    page.get_by_text("sentence 0 has 10000 characters; write at most 1000").wait_for(timeout=WAIT)


def test_a_closed_page_loses_nothing(page, address):
    write(page, SENTENCES, steps=40)
    generate(page)
    page.locator("#status progress[value]").wait_for(timeout=WAIT)
    page.wait_for_url("**story=*")
    link = page.url
    page.goto("about:blank")

    page.goto(link)
    page.locator("#strip img").nth(4).wait_for(timeout=WAIT)
    assert page.get_by_label("Sentences").input_value() == "\n".join(SENTENCES)
    page.get_by_text("My stories").click()
    page.get_by_role("link", name=f"{SENTENCES[0]} (5)").click()
    page.locator("#strip img").nth(4).wait_for(timeout=WAIT)


def test_the_password_is_asked_for(page, address):
    other = page.context.browser.new_context()
    assert other.request.get(address).status == 401
    other.close()
