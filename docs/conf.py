"""The site: `sphinx-build -W -n -b html docs OUT`; `tox -e docs` builds it and tests it.

README, CHANGELOG and CONTRIBUTING are pages of it as they stand. It loads nothing from elsewhere.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

import coordconv

sys.path.insert(0, str(Path(__file__).parent))

import house

project = "coordconv"
author = "The coordconv contributors"
copyright = f"{author}, MIT licence"
version = release = coordconv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source"]
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True

# Names that have no page here; what lists the pages of other projects would need the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|filterlib|flax|hypothesis|jax|nn|nnx|npt|numpy|os)\.\w.*"),
    (r"py:.*", r"(paddle|re|rnglib|torch|tp|weakref)\.\w.*"),
    (r"py:class", r"Array|Choice|CoordinatesLike|Position|(Flax|Tape)Changes"),
    # Aliases of Paddle and Flax in the signatures of their layers, which ours take over.
    (r"py:class", r"DTypeLike|DataLayout\dD|ParamAttrLike|PlaceLike|Size\d|_Padding\w+Mode"),
    (r"py:class", r"ConvGeneralDilatedT|Dtype|Initializer|P(adding|recision)Like|PromoteDtypeFn"),
]

html_theme = "furo"
highlight_language = "none"  # of a block that names none: what a command printed
pygments_dark_style = "github-dark"
html_title = f"coordconv {version}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = html_domain_indices = False  # the search finds it all
html_show_sourcelink = False


class House(SphinxDirective):
    """``{house}``: the picture of what imports what, as the imports are when the site is built."""

    def run(self) -> list[nodes.Node]:
        return [nodes.raw("", house.svg(), format="html")]


def of_the_site(app: Sphinx, path: Path, parent: str, text: list[str]) -> None:
    """Turn the links between the files of the root, and from them to docs/, into those of pages."""
    links = re.sub(r"\]\(docs/", "](", text[0])
    text[0] = re.sub(
        r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda found: f"]({found[1].lower()}.md", links
    )


def with_short_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str, returned: str
) -> tuple[str, str]:
    """Write signatures as the code does: arrays as Array, functions and classes by their names."""
    if what == "class" and arguments == "(*args: Any, **kwargs: Any)":  # a metaclass's
        signature = inspect.signature(obj.__init__)
        _, *own = signature.parameters.values()
        arguments = stringify_signature(inspect.Signature(own))
    array = "~numpy.ndarray[tuple[~typing.Any, ...], ~numpy.dtype[~typing.Any]]"
    named = re.compile(r"<(?:function|class) '?(?:[\w<>]+\.)*(\w+)'?>")
    return tuple(
        text and named.sub(r"\1", text.replace(array, "Array")) for text in (arguments, returned)
    )


def with_all_arguments(app: Sphinx, obj: Any, bound_method: bool) -> None:
    """Undo what autodoc did to a bound method that is listed as a function, as ``recorded`` is.

    It gave the function behind it the signature without ``self``, of which it would leave out one
    argument more.
    """
    if inspect.ismethod(obj) and not bound_method:
        vars(obj.__func__).pop("__signature__", None)


def with_kinds_of_cells(app: Sphinx, document: nodes.document) -> None:
    """Tell site.css which cells of tables are short, such as numbers, and which are long."""
    for cell in document.findall(nodes.entry):
        length = len(cell.astext())
        cell["classes"] += ["short"] * (length <= 20) + ["long"] * (length > 40)


def setup(app: Sphinx) -> None:
    """Tell Sphinx of these."""
    app.connect("doctree-read", with_kinds_of_cells)
    app.connect("autodoc-before-process-signature", with_all_arguments)
    app.connect("autodoc-process-signature", with_short_types)
    app.add_directive("house", House)
    app.connect("include-read", of_the_site)
