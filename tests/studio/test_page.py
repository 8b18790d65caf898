"""The page in a browser: a story is written, generated, changed, exported and opened again."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from PIL import Image

from contextualstory_jax.studio import server
from contextualstory_jax.studio.studio import Studio
from contextualstory_jax.studio.worker import Model
from tests.helpers.studio import SENTENCES

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SCRIPT = "Mia says <script>document.title = 'bad'</script> ${1+1} {{value}} <b>hi</b>."
WAIT = 60_000  # milliseconds; of the first story it takes some to compile

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=WAIT)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH, nor in CHROMIUM"),
]


@pytest.fixture
def studio(model, tiny_continuation_checkpoint, worker, projects):
    """A studio with the tiny models."""
    return Studio([model, Model(str(tiny_continuation_checkpoint))], projects, worker)


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
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
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


def test_frames_and_what_belongs_to_them_are_moved_and_written(page):
    sentences = [*SENTENCES[:3], "They nap.", *SENTENCES[:4]]  # the second window begins there
    write(page, sentences)
    page.get_by_label("Seed").focus()
    page.get_by_text("sentence 4 begins a window: say below who 'They' is").wait_for(timeout=WAIT)
    page.get_by_label("For sentence 4").fill("Mia and Otto nap.")
    page.get_by_label("For sentence 4").press("Tab")
    page.get_by_text("StoryFlow:").click()
    slider = page.get_by_label("Scene change from frame 4 to 5")
    slider.fill("9")
    expect(page.get_by_text("begins a window: say below")).to_have_count(0)
    generate(page)
    page.locator("#strip img").nth(7).wait_for(timeout=WAIT)
    before = frames(page)

    page.get_by_role("button", name="Move frame 4 earlier").click()
    expect(page.locator("#strip figcaption").nth(2)).to_have_text("They nap.")
    assert frames(page)[2:4] == [before[3], before[2]]
    page.get_by_role("button", name="Remove frame 1").click()
    expect(page.locator("#strip img")).to_have_count(7)
    text = page.get_by_label("Sentences")
    moved = [sentences[i] for i in (1, 3, 2, 4, 5, 6, 7)]
    expect(text).to_have_value("\n".join(moved))
    expect(page.get_by_label("For sentence 2")).to_have_value("Mia and Otto nap.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#strip img")).to_have_count(8)

    # A line more, all others locked: one frame is generated.
    page.get_by_role("button", name="Redo").click()
    expect(page.locator("#strip img")).to_have_count(7)
    for number in range(1, 8):
        page.get_by_label(f"Lock frame {number}", exact=True).check()
    after = frames(page)
    text.fill("\n".join([*moved, "Otto jumps."]))
    generate(page)
    page.locator("#strip img").nth(7).wait_for(timeout=WAIT)
    assert frames(page)[:7] == after

    text.fill("\n".join([*moved, "Written, and not generated."]))
    page.get_by_label("Seed").focus()
    page.wait_for_timeout(500)
    page.reload()
    expect(text).to_have_value("\n".join([*moved, "Written, and not generated."]))


def test_a_new_story_is_written_on_after_the_page_was_closed(page, address):
    write(page, SENTENCES[:2])
    page.goto("about:blank")
    page.goto(address)

    expect(page.get_by_label("Sentences")).to_have_value("\n".join(SENTENCES[:2]))


def test_a_model_is_chosen_and_continues_from_a_frame(
    studio, tiny_continuation_checkpoint, page, tmp_path
):
    assert not page.get_by_text("First frame").is_visible()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=str(tiny_continuation_checkpoint)).click()
    page.get_by_text("Which sentences the model knows").click()
    page.get_by_text("A continuation model: 5 sentences").wait_for(timeout=WAIT)
    write(page, SENTENCES)
    generate(page)
    page.get_by_text("give a first frame, which the story continues").wait_for(timeout=WAIT)

    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "own.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "own.png")
    page.get_by_label("Remove Image").wait_for(timeout=WAIT)
    generate(page)
    page.locator("#strip img").nth(4).wait_for(timeout=4 * WAIT)  # it is compiled
    assert page.get_by_role("button", name="Regenerate frame 1", exact=True).count() == 0
    page.reload()
    page.locator("#strip img").nth(4).wait_for(timeout=WAIT)
    expect(page.get_by_role("combobox", name="Model")).to_have_value(
        str(tiny_continuation_checkpoint)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(page, scheme):
    import axe_playwright_python

    page.emulate_media(color_scheme=scheme)
    page.reload()
    write(page, [*SENTENCES[:3], "They nap.", *SENTENCES[:4]])
    generate(page)
    page.locator("#strip img").nth(7).wait_for(timeout=WAIT)
    page.get_by_role("button", name="Candidates for frame 2").click()
    page.get_by_role("button", name="Choose candidate 2").wait_for(timeout=WAIT)
    page.get_by_label("For sentence 4").wait_for(timeout=WAIT)
    page.get_by_text("StoryFlow:").click()
    page.get_by_text("My stories").click()
    page.locator("#flow input").first.wait_for()

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
