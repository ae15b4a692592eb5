"""Pictures of the dashboard page for docs/dashboard.md, of a server that is made up.

Run from the repository's root: python scripts/dashboard_shots.py [FOLDER]
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.server.browser import Page, browsing
from tests.server.dashboard_world import World, world
from tests.server.fake_control import KEY, serving

SHOTS = (
    ("light", 1200, 0, 1.0),
    ("dark", 1200, 0, 1.0),
    ("phone", 390, 844 * 2, 2.0),
)


def prepare(page: Page, made: World) -> None:
    """Wait for everything, and open a plan."""
    page.wait("document.querySelector('#key') === document.activeElement")
    page.type(KEY)
    page.press("Enter")
    page.wait("document.querySelectorAll('.charts .band').length > 2")
    page.run("document.querySelector('[data-plan$=mixed]').open = true")
    page.wait("document.querySelector('svg.plan')")
    for _ in range(8):
        made.jobs.step(43)
        n = made.jobs.evaluations
        page.wait(f"document.querySelector('#jobs').innerText.includes('{n:,}')")
    page.run("document.activeElement.blur()")


def small(picture: bytes) -> Image.Image:
    """With few colours, which is what the page has."""
    whole = Image.open(io.BytesIO(picture)).convert("RGB")
    return whole.quantize(128, dither=Image.Dither.NONE)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    with tempfile.TemporaryDirectory() as state, browsing() as page:
        made = world(Path(state), every=0.1)
        made.control.begin_swap()
        with serving(made.app) as url:
            page.size(1200, 900)
            page.open(url)
            prepare(page, made)
            for name, width, height, scale in SHOTS:
                page.size(width, 900, scale=scale, phone=name == "phone")
                page.prefer(prefers_color_scheme="dark" if name == "dark" else "light")
                small(page.picture(height or None)).save(
                    folder / f"dashboard-{name}.png", optimize=True
                )


if __name__ == "__main__":
    main()
