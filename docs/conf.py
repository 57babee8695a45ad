"""The documentation site: `sphinx-build -W --keep-going -b html docs <folder>`.

The pages are Markdown that also reads well without a site. Nothing here needs the
network, neither to build the pages nor to read them.
"""

import html
import inspect
import re
from pathlib import Path
from types import ModuleType

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import optax_vasso
from optax_vasso import (
    ascent,
    descent,
    factors,
    gate,
    metrics,
    sharpness,
    train,
    wrappers,
)
from optax_vasso.sharpness import plot

logger = logging.getLogger(__name__)

project = "optax_vasso"
author = "The optax_vasso authors"
copyright = author
version = release = optax_vasso.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]
# Inventories of Optax's and JAX's pages would have to be fetched: names of others
# are left without links, and those of this package must all be found.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|flax|functools|jax|matplotlib|numpy|optax|typing)\..*"),
    ("py:.*", r"(Array|Axes|Mesh|PartitionSpec)"),
]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub's spelling of displayed mathematics
myst_heading_anchors = 4
# Executed pages are kept by the text of their cells: after a change of the library pass
# -D nb_execution_mode=force, as .ci/run does.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "executed")
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds for a cell, on a machine with other things to do
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more, shapes and dtypes
autodoc_preserve_defaults = True  # gradient=whole_batch, and no address of a function
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
add_module_names = False

html_theme = "furo"
html_title = "optax_vasso"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["tables.js"]
html_math_renderer = "mathml"
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Commands that docutils does not know by the name that GitHub's MathJax knows.
MATHEMATICS = {"dots": r"\ldots", "lt": "<", "gt": ">"}


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write MathML, which browsers draw without a script from elsewhere."""
    translator.body.append(mathml(node))
    raise nodes.SkipNode


def displayed_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """As above, on lines of its own."""
    translator.body.append(translator.starttag(node, "div", "", CLASS="math"))
    translator.body.append(mathml(node) + "</div>\n")
    raise nodes.SkipNode


def mathml(node: nodes.Element) -> str:
    displayed = isinstance(node, nodes.math_block)
    # Displayed mathematics is set as one `align*` whatever surrounds it.
    text = re.sub(r"\\(begin|end){(align|equation)\*?}", "", node.astext())
    for command, known in MATHEMATICS.items():
        text = re.sub(rf"\\{command}(?![A-Za-z])", lambda _, known=known: known, text)
    try:
        markup = tex2mathml(text, as_block=displayed)
    except MathError as error:
        logger.warning("%s in %r", error, text, location=node)
        return html.escape(node.astext())
    # The bars of a norm are brackets of the usual size; only \left and \right stretch.
    opening, closing = (
        f'<mo form="{form}" stretchy="false">' for form in ("prefix", "postfix")
    )
    markup = markup.replace('<mo class="mathopen">', opening)
    markup = re.sub("<mo>([|‖])</mo>", rf"{closing}\1</mo>", markup)
    # A space between log and its argument, unless that stands in brackets.
    return re.sub(
        r"<mo>&ApplyFunction;</mo>(?=\s*<m[in])", '<mspace width="0.1667em"/>', markup
    )


def linked_names() -> dict[str, str]:
    """The names by which a page may call a public object, with its full name."""

    def public(module: ModuleType) -> list[str]:
        names = getattr(module, "__all__", vars(module))
        return [
            name
            for name in names
            if name[0] != "_" and not isinstance(getattr(module, name), ModuleType)
        ]

    names = {}
    for module in (
        gate,
        ascent,
        descent,
        factors,
        metrics,
        sharpness,
        train,
        wrappers,
        optax_vasso,
    ):
        path = module.__name__
        for name in public(module):
            short = path.removeprefix("optax_vasso").lstrip(".")
            target = f"{path}.{name}"
            names[f"{short}.{name}".lstrip(".")] = target
            if module is not gate:  # `every` and `always` are words as well
                names[name] = target
    for name, _ in inspect.getmembers(plot, inspect.isfunction):
        for short in ("plot", "sharpness.plot"):  # `line` and `plane` are words as well
            names[f"{short}.{name}"] = f"optax_vasso.sharpness.plot.{name}"
    for short in ("checkpoints", "checkpoint.checkpoints"):
        names[short] = "optax_vasso.train.checkpoint.checkpoints"
    return names


class LinkPublicNames(SphinxTransform):
    """Link each `vasso` or `sam_perturb(rho)` of a page to the reference.

    The pages stay plain Markdown that way, and no name is left without a link.
    """

    default_priority = 500
    names = linked_names()

    def apply(self) -> None:
        """Put a reference around every literal that begins with a public name."""
        inside = (
            nodes.reference,
            nodes.title,
            addnodes.pending_xref,
            addnodes.desc_name,
        )
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(
                r"(?:ov\.|optax_vasso\.)?([\w.]+)(?:\(.*\))?",
                literal.astext(),
                re.DOTALL,
            )
            if match is None or isinstance(literal.parent, inside):
                continue
            if target := self.names.get(match[1]):
                reference = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=target
                )
                reference["refdoc"] = self.env.docname
                literal.replace_self(reference)
                reference += literal


def setup(app: Sphinx) -> None:
    """Register the renderer of mathematics and the links to the reference."""
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    app.add_transform(LinkPublicNames)
