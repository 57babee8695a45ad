"""Results files: written whole or not at all, and never replaced by a lesser run."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Drawing = Callable[[Path, dict[str, Any]], None]


def check_writable(folder: Path) -> None:
    """Raise an OSError if files cannot be made in a folder, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN, which JSON has not, is refused."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def finite(content: Any) -> Any:
    """What is to be written, with ``None`` for numbers that are not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_json(path: Path) -> dict[str, Any] | None:
    """What a results file says, or ``None`` if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def is_larger(path: Path, size: int) -> bool:
    """Whether a finished run of more than ``size`` gradients has written ``path``."""
    found = read_json(path)
    return found is not None and found["finished"] and found["size"] > size


def save(
    folder: Path,
    name: str,
    content: dict[str, Any],
    *,
    size: int,
    finished: bool,
    draw: Drawing | Mapping[str, Drawing] | None = None,
) -> list[Path]:
    """Write ``name.json`` and its figure, and replace no finished larger run.

    What was not finished goes to ``name.partial.json``, and what is smaller than
    the finished run that is there to ``name.smaller.json``.

    Args:
      folder: where to.
      name: of the files, without an ending.
      content: what the file is to say; ``size``, ``finished`` and the environment are
        added.
      size: gradients of the whole run, as a measure of how much it is worth.
      finished: whether all of it was done.
      draw: (path, content) -> None writes the figure; or several, by what is added to
        their names.

    Returns:
      The files that were written.
    """
    path = folder / f"{name}.json"
    if not finished:
        path = folder / f"{name}.partial.json"
    elif is_larger(path, size):
        path = folder / f"{name}.smaller.json"
    content = {
        "size": size,
        "finished": finished,
        "environment": environment(),
    } | content
    write_json(path, content)
    return [path, *(write_figures(path, content, draw) if draw else [])]


def write_figures(
    path: Path, content: dict[str, Any], draw: Drawing | Mapping[str, Drawing]
) -> list[Path]:
    """Draw the figures of a results file beside it, and name them.

    Args:
      path: of the results file.
      content: what it says.
      draw: as of :func:`save`.
    """
    drawings = draw if isinstance(draw, Mapping) else {"": draw}
    written = []
    for added, one in drawings.items():
        picture = path.with_name(f"{path.stem}{added}.png")
        write_atomically(picture, lambda temporary, one=one: one(temporary, content))
        written.append(picture)
    return written


def environment() -> dict[str, Any]:
    """Versions and device, for a results file."""
    import jax
    import optax

    import optax_vasso

    device = jax.devices()[0]
    return {
        "optax_vasso": optax_vasso.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": sys.version.split()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "cpu_count": os.cpu_count(),
    }
