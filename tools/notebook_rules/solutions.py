"""Folded solutions as nbval's items: run in their notebook's kernel after its last cell, and their
texts compared with what they print."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell

from .prose import check_solution, figures_shown, solutions


def solution_items(notebook: pytest.File) -> list[pytest.Item]:
    """An item for each folded solution of a notebook that nbval has collected."""
    content = nbformat.read(notebook.path, as_version=4)
    shown, items = figures_shown(content), []
    cells = sum(cell.cell_type == "code" for cell in content.cells)
    for number, (code, text) in enumerate(solutions(content), 1):
        item = IPyNbCell.from_parent(
            notebook,
            name=f"Solution {number}",
            cell_num=cells + number - 1,
            cell=new_code_cell(code),
            options=defaultdict(bool),
        )
        item.check_solution = partial(check_solution, text, shown=shown)
        items.append(item)
    return items
