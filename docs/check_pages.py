"""Check every page of the built site in headless Chromium, at two widths.

``python docs/check_pages.py SITE [--shots FOLDER]`` prints each table of which a header
or a number breaks across lines or that is wider than the page, and each page that
scrolls sideways; it exits with 1 if there are any. It needs Chromium and its driver
from the system, and ``pip install selenium``.
"""

import argparse
import sys
from pathlib import Path

WIDTHS = (1400, 390)
# A word has broken if its rectangles lie on more than one line.
SCRIPT = """
const found = [];
document.querySelectorAll("article details").forEach((d) => (d.open = true));
window.dispatchEvent(new Event("resize"));
const lines = (node, start, end) => {
  const range = document.createRange();
  range.setStart(node, start);
  range.setEnd(node, end);
  return new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size;
};
const WORD = /[\\p{L}\\p{N}]{2,}/gu;
const ERROR = /\\d[\\d.]*\\s±\\s\\d[\\d.]*/gu;
for (const table of document.querySelectorAll("article table.docutils")) {
  const stacked = table.classList.contains("stacked");
  for (const cell of table.querySelectorAll("th, td")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.parentElement.closest("code")) continue;
      for (const pattern of [ERROR, ...(stacked ? [] : [WORD])])
        for (const match of node.data.matchAll(pattern))
          if (lines(node, match.index, match.index + match[0].length) > 1)
            found.push(`breaks: ${match[0]}`);
    }
  }
  if (table.scrollWidth > table.clientWidth + 1)
    found.push(`scrolls: table of ${table.rows[0].innerText.replace(/\\s+/g, " ")}`);
}
const page = document.scrollingElement;
if (page.scrollWidth > page.clientWidth + 1) found.push("the page scrolls sideways");
return [...new Set(found)];
"""


def main() -> int:
    """Open every page at both widths; print what is wrong."""
    from selenium import webdriver

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, help="folder that sphinx-build wrote")
    parser.add_argument("--shots", type=Path, help="folder for pictures of the pages")
    options = parser.parse_args()
    flags = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        flags.add_argument(f"--{flag}")
    problems = 0
    with webdriver.Chrome(flags, webdriver.ChromeService("/usr/bin/chromedriver")) as b:
        for path in sorted(options.site.rglob("*.html")):
            name = path.relative_to(options.site)
            if name.parts[0].startswith("_"):
                continue
            for width in WIDTHS:
                # Not by the size of the window, which has a least width.
                size = {"width": width, "height": 1000, "mobile": False}
                b.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride",
                    size | {"deviceScaleFactor": 1},
                )
                b.get(path.resolve().as_uri())
                found = b.execute_script(SCRIPT)
                problems += len(found)
                for line in found:
                    print(f"{name} at {width}: {line}")
                if options.shots:
                    options.shots.mkdir(parents=True, exist_ok=True)
                    height = b.execute_script("return document.body.scrollHeight")
                    size["height"] = min(height, 8000)
                    b.execute_cdp_cmd(
                        "Emulation.setDeviceMetricsOverride",
                        size | {"deviceScaleFactor": 1},
                    )
                    stem = str(name.with_suffix("")).replace("/", "_")
                    b.save_screenshot(str(options.shots / f"{stem}_{width}.png"))
    print(f"{problems} problems" if problems else "No problems.")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
