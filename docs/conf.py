"""Settings of the site: `make docs` builds `docs/` with Sphinx, MyST and Furo."""

from configparser import ConfigParser
from pathlib import Path

_setup = ConfigParser()
_setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")

project = "editlib"
copyright = "the editlib authors, MIT licence"
version = release = _setup["metadata"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

smartquotes = False  # quoted JSON and templates are to be copied as they are

html_theme = "furo"
html_title = f"editlib {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

linkcheck_ignore = [r"https?://"]  # links inside the site only: the others need a network
