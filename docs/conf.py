"""The documentation's build: `make docs`.

Sphinx, with MyST for Markdown and the theme Furo, as JAX and Flax have it: all are maintained and
read the API from docstrings. MkDocs has no maintained release, its theme Material gets fixes only.
"""

from typing import Any

import jax
from flax import nnx
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

from contextualstory_jax import __version__

jax.Array.__name__ = "Array"  # or signatures have Float[jaxlib._jax.Array, "b c"]

project = "contextualstory_jax"
author = "the contextualstory_jax authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"

# A link to a file that is no page, such as ../contextualstory_jax/train.py, offers the file itself.
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# Names of this package must be on a page. Those of others are not looked up: the build needs no
# network; and a type variable has no page.
nitpick_ignore_regex = [("py:.*", r"(?!contextualstory_jax\.).*"), ("py:.*", r".*\.[A-Z]")]


def of_init(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str]:
    """A Flax module's own arguments, in place of those of the metaclass of all of them."""
    if what == "class" and isinstance(obj, type) and issubclass(obj, nnx.Module):
        init = signature_of(obj.__init__, bound_method=True)
        signature = stringify_signature(init, unqualified_typehints=True)
    return signature, returned


def setup(app: Any) -> None:
    """Connect the hook of signatures."""
    app.connect("autodoc-process-signature", of_init)
