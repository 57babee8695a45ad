"""Write the pictures of the gallery on docs/index.md from the executed tutorials.

Run ``python docs/thumbnails.py`` after ``sphinx-build -b html docs site``.
"""

import base64
import io
from pathlib import Path

from jupyter_cache import get_cache
from myst_nb.core.read import read_myst_markdown_notebook
from PIL import Image

DOCS = Path(__file__).parent
# Which picture of each tutorial; -1 is its last.
SHOWN = {
    "first_training": 0,
    "flax_batchnorm": 0,
    "own_adversary": 0,
    "many_devices": 0,
    "flatness": -1,
}
WIDTH = 640  # pixels


def pictures(tutorial: str) -> list[bytes]:
    """The pictures of a tutorial as they were when it was last executed."""
    cache = get_cache(DOCS / "_build" / "executed")
    text = (DOCS / "tutorials" / f"{tutorial}.md").read_text()
    record = cache.match_cache_notebook(read_myst_markdown_notebook(text))
    cells = cache.get_cache_bundle(record.pk).nb.cells
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


if __name__ == "__main__":
    for tutorial, number in SHOWN.items():
        image = Image.open(io.BytesIO(pictures(tutorial)[number])).convert("RGB")
        image.thumbnail((WIDTH, WIDTH))
        image.quantize(64).save(DOCS / "_static" / f"{tutorial}.png", optimize=True)
