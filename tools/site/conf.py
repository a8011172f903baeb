"""Sphinx's settings. Of the generators at hand Sphinx is the one with years of care ahead of it.

MyST reads the pages as the Markdown that a repository shows, Furo has light, dark and small
screens, and neither asks another host for anything: the site opens from the disk, search and all.
"""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "truenorm"
author = "the authors of truenorm"
copyright = "the authors of truenorm"
version = release = metadata.version("truenorm")
extensions = ["myst_parser", "formulas"]
html_math_renderer = "outlines"
myst_enable_extensions = ["dollarmath", "attrs_block", "html_image"]
myst_heading_anchors = 4
myst_dmath_allow_labels = False
myst_dmath_allow_digits = False
html_theme = "furo"
html_title = "truenorm"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # it would fetch pages, which a page opened from the disk cannot
highlight_language = "text"
# what is no mistake: a page may begin a section below its title with any level
suppress_warnings = ["myst.header"]
