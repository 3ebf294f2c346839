"""The documentation site: ``make docs`` builds it into docs/_build/html.

Sphinx, because the reference comes from the docstrings; MyST, because the pages are Markdown that also reads well in
the repository; furo, because it brings its own scripts, icons and search and needs no other server.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import gradcentral

ROOT = Path(__file__).parents[1]
REPOSITORY = re.findall(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0]

project = "gradcentral"
author = "The gradcentral developers"
copyright = author
version = release = gradcentral.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The tour is a notebook as text; it runs at build time, and an error in a cell fails the build. It is not cached,
# because the cache would not notice a change of the package.
nb_execution_mode = "force"
nb_execution_in_temp = True  # the tour writes the results of a comparison
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # scripts on another server, for widgets, which no page has

# The adapters import these; only their own docstrings are read.
autodoc_mock_imports = ["accelerate", "jax", "keras", "lightning", "mmengine", "optax", "timm", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100  # a longer signature has one line per parameter
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "any"

html_theme = "furo"
html_title = f"gradcentral {version}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
pygments_dark_style = "github-dark"  # the default underlines the names of modules, as if they were links
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

linkcheck_anchors = False
linkcheck_ignore = [rf"{re.escape(REPOSITORY)}/(blob|tree)/main/"]  # tests/test_docs.py finds these files in the tree


def _link_sources(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to files outside docs/ point to the repository; the pages have relative links, which work there too."""
    source[0] = re.sub(r"\]\((?:\.\./)+([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", source[0])


def _check_offline(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a page that loads a script, a style, a font or a picture from another server."""
    if exception is not None or app.builder.format != "html":
        return
    loads = (
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc(?:set)?=["']?((?:https?:)?//[^"' ]+)"""
        r"""|<link\b(?=[^>]*rel="(?:stylesheet|preload|icon)")[^>]*href="((?:https?:)?//[^"]+)"""
    )
    loads_in_css = r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)"""
    for file in sorted(Path(app.outdir).rglob("*")):
        if file.suffix in (".html", ".css"):
            text = file.read_text(encoding="utf-8")
            for found in re.findall(loads if file.suffix == ".html" else loads_in_css, text):
                address = found if isinstance(found, str) else "".join(found)
                raise ExtensionError(f"{file.relative_to(app.outdir)} needs another server: {address}")


def setup(app: Sphinx) -> None:
    """Register the page transform and the check of the finished site."""
    app.connect("source-read", _link_sources)
    app.connect("build-finished", _check_offline)
