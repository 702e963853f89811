"""Open a page in headless Chromium: PAGE BROWSER SCREENSHOTS. Runs in an environment of its own.

Prints one JSON object: for each width and colour scheme what the console said, what was asked
of the network, and what can be seen.
"""

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]

LOOK = """() => {
  const seen = (e) => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
  const root = document.documentElement;
  const luminance = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number)
      .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
      return (x + 0.05) / (y + 0.05); };
  const card = getComputedStyle(document.querySelector(".card")).backgroundColor;
  const texts = [...document.querySelectorAll("svg text")];
  return {
    charts: [...document.querySelectorAll("svg.chart")].filter(seen).map((e) => ({
      name: e.dataset.chart, width: e.getBoundingClientRect().width,
      marks: e.querySelectorAll("rect, circle, polyline").length })),
    scroll_width: root.scrollWidth,
    client_width: root.clientWidth,
    paper: luminance(getComputedStyle(document.body).backgroundColor),
    contrast: contrast(getComputedStyle(document.body).color, card),
    soft_contrast: contrast(getComputedStyle(document.querySelector(".soft")).color, card),
    font: Math.min(...[...document.querySelectorAll("svg.chart")].map((e) =>
      10.5 * e.getBoundingClientRect().width / 360)),
    cut: texts.filter((e) => { const r = e.getBoundingClientRect();
      const s = e.ownerSVGElement.getBoundingClientRect();
      return r.left < s.left - 2 || r.right > s.right + 2 || r.bottom > s.bottom + 2
        || r.top < s.top - 2; }).map((e) => e.textContent),
    columns: new Set([...document.querySelectorAll("figure.card")].map((e) =>
      Math.round(e.getBoundingClientRect().left))).size,
  };
}"""

PAPER = 718  # pixels between the margins of A4
ON_PAPER = """() => ({
    width: document.documentElement.scrollWidth,
    cut: [...document.querySelectorAll(".card, .scroll, table")]
      .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth
        || e.scrollWidth > e.clientWidth + 1)
      .map((e) => e.id || e.className),
})"""


def main() -> None:
    """Look at one page four times, and print it once."""
    page_file, executable, shots = sys.argv[1:4]
    found: dict[str, Any] = {}
    with sync_playwright() as playwright:
        options = {"executable_path": executable} if executable else {}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **options)
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                said: list[str] = []
                asked: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(Path(page_file).as_uri())
                found[f"{width} {scheme}"] = page.evaluate(LOOK) | {"said": said, "asked": asked}
                page.screenshot(path=f"{shots}/{width}-{scheme}.png", full_page=True)
                page.close()
        page = browser.new_page(viewport={"width": PAPER, "height": 1000})
        page.goto(Path(page_file).as_uri())
        page.emulate_media(media="print")
        page.screenshot(path=f"{shots}/print.png", full_page=True)
        found["printed"] = page.evaluate(ON_PAPER) | {"bytes": len(page.pdf(format="A4"))}
        browser.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
