"""An executed notebook as a page to read."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbconvert import HTMLExporter


def render_notebook(path: Path) -> None:
    """Write an executed notebook as HTML beside it, with its images inside.

    One that is not there or cannot be rendered has none: a run without that page is better than one
    that stops.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        html, _ = HTMLExporter(template_name="lab", embed_images=True).from_notebook_node(
            notebook, resources={"metadata": {"name": path.stem, "path": str(path.parent)}}
        )
        path.with_suffix(".html").write_text(html, encoding="utf-8")
    except Exception:
        return
