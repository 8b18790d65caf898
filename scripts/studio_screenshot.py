"""A screenshot of the studio with a story of eight frames, for the documentation.

python scripts/studio_screenshot.py --out docs/images/studio.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from studio_load import Server, call

SENTENCES = (
    "emil is under the stars at the left .",
    "otto comes to the right .",
    "they wave a hand .",
    "they take a nap .",
    "emil jumps up high under the stars while otto watches .",
    "otto waves a hand .",
    "otto says goodbye and goes away .",
    "he takes a nap .",
)
CONTEXT = {"3": "emil and otto take a nap .", "5": "otto waves a hand under the stars ."}
WAIT = 120_000  # milliseconds


def main() -> None:
    """Generate the story, lock six frames and write the image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", help="default: the model that ships")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(arguments.checkpoint, Path(folder))
        made = call(server.base, "generate", sentences=SENTENCES, context=CONTEXT, seed=1)
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(f"{server.base.partition('/gradio_api')[0]}/?story={made['story']}")
        page.locator("#strip img").nth(len(SENTENCES) - 1).wait_for(timeout=WAIT)
        for number in (1, 2, 3, 5, 6, 7):
            page.get_by_label(f"Lock frame {number}", exact=True).check()
        page.wait_for_timeout(1000)
        page.screenshot(path=arguments.out)
        browser.close()
        server.kill()
    Image.open(arguments.out).quantize(256).save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
