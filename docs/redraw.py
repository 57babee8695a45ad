"""Draw the figures of the pages again from the JSON files in results/.

Run ``python docs/redraw.py`` after a change of how they are drawn, with the names of
result files to draw only theirs. Nothing is trained or measured.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import figures as benchmarks  # noqa: E402
from experiments import (  # noqa: E402
    batch_size,
    best_radius,
    bouncing,
    char_lm,
    domain_generalization,
    flatness,
    forgetting,
    label_noise,
    lagged_feeding,
    quantization,
    radius,
    radius_warmup,
    sign,
)
from experiments.harness import files, verdicts  # noqa: E402

# What draws a results file, as files.save takes it.
DRAWINGS: dict[str, Any] = {
    "evidence": verdicts.FIGURES,
    "label_noise": label_noise.draw,
    "radius_digits-75": radius.draw,
    "radius_along_digits-75": functools.partial(radius.draw, along=True),
    "best_radius": best_radius.draw,
    "radius_warmup": radius_warmup.draw,
    "lagged_feeding": lagged_feeding.draw,
    "sign": sign.draw,
    "flatness": flatness.FIGURES,
    "bouncing": bouncing.draw,
    "batch_size_0": batch_size.draw,
    "batch_size_50": batch_size.draw,
    "char_lm": char_lm.draw,
    "char_lm_width_64": char_lm.draw,
    "quantization": quantization.draw,
    "quantization_5000": quantization.draw,
    "quantization_10000": quantization.draw,
    "forgetting": forgetting.draw,
    "domain_generalization": domain_generalization.draw,
    **{
        make.__name__: lambda path, content, make=make: make(path)
        for make in benchmarks.FIGURES
    },
}


def redraw(name: str, folder: Path = ROOT / "results") -> list[Path]:
    """Draw what shows a results file."""
    path = folder / f"{name}.json"
    return files.write_figures(path, json.loads(path.read_text()), DRAWINGS[name])


if __name__ == "__main__":
    for name in sys.argv[1:] or DRAWINGS:
        print(*redraw(name), sep="\n")
