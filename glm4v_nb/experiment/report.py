"""The report of a run: index.html, one self-contained page, and each executed notebook as HTML."""

from __future__ import annotations

from pathlib import Path

import jinja2
import nbformat
from nbconvert import HTMLExporter

from .files import write_whole
from .summary import RunSummary

# Autoescaping is on for every value: titles, errors and tracebacks are text written by notebooks.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(summary: RunSummary, directory: Path) -> Path:
    """Write directory/index.html for `summary`, replacing an earlier one whole; returns its path."""
    path = directory / "index.html"
    headline = f"{summary.count('done')} of {len(summary.notebooks)} notebooks done"
    page = _TEMPLATES.get_template("report.html.jinja").render(summary=summary, headline=headline)
    write_whole(path, page)
    return path


def render_notebook(directory: Path, executed: str | None) -> str | None:
    """Render the executed notebook of that name in `directory` to HTML with its images inside.

    Returns the HTML's file name, or None when there is no executed notebook or it cannot be rendered: a
    report without one rendering is better than a run that stops.
    """
    if executed is None:
        return None
    try:
        notebook = nbformat.read(directory / executed, as_version=4)
        html, _ = HTMLExporter(template_name="lab", embed_images=True).from_notebook_node(
            notebook, resources={"metadata": {"name": Path(executed).stem, "path": str(directory)}}
        )
        rendered = Path(executed).with_suffix(".html").name
        (directory / rendered).write_text(html, encoding="utf-8")
    except Exception:
        return None
    return rendered
