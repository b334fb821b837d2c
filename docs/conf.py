"""How Sphinx makes a site of these pages: `python -m sphinx -W -b html docs site`.

The pages are read as files too, so they link to one another by relative paths, which MyST resolves.
Nothing on the site is fetched from elsewhere: no fonts, no scripts, no inventories of other sites.
"""

import sys
from pathlib import Path

import treeify

sys.path.insert(0, str(Path(__file__).parent))  # the last two extensions

project = "treeify"
author = "The treeify authors"
copyright = author
version = release = treeify.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_reference",
    "docstrings",
]
exclude_patterns = ["results/cifar10_jpeg/*"]

myst_heading_anchors = 4  # `page.md#a-heading` is how pages link to sections

default_role = "code"  # docstrings quote code as `this`
highlight_language = "none"  # fences without a language are commands and listings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "treeify"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
