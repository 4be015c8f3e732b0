"""Whether the code reads what a name holds before it gives the name another value."""

from __future__ import annotations

import ast
import re
import symtable
import warnings
from collections.abc import Iterable, Iterator
from keyword import iskeyword

from IPython.core.inputtransformer2 import TransformerManager

_PYTHON_MAGICS = ("time", "timeit", "capture", "prun")
# What IPython puts values into, in the line of a magic and in a shell command.
_EXPANDED = re.compile(r"\{[^{}]*\}|\$\w+")
_WORD = re.compile(r"[^\W\d]\w*")
# Of these, nobody knows which parts run, or how often.
_UNSURE = (ast.If, ast.While, ast.For, ast.AsyncFor, ast.Try, ast.TryStar, ast.Match)


def parse_cell(source: str) -> ast.Module:
    """The code of a cell as a tree, its magics and shell commands as the calls that IPython makes
    of them.

    Raises SyntaxError.
    """
    with warnings.catch_warnings():
        # An invalid escape in a lesson's string is that lesson's matter.
        warnings.simplefilter("ignore")
        return ast.parse(TransformerManager().transform_cell(source))


class Reads:
    """Follows names through module-level code, cell after cell, in the order it is written.

    In doubt a name counts as read: whatever reads it inside ``if``, ``try`` and the like does, and
    what is bound there may not be. The body of a function or class counts as run where it is
    defined. ``name += 1`` passes the value on. Not looked into: ``globals()["name"]``, ``exec``,
    ``import *``.

    Attributes:
        read: names that were read while they might hold their first value.
        rebound: the cell that gave a name another value, for names that had not been read before.
    """

    def __init__(self, names: Iterable[str]):
        self._held = set(names)
        self.read: set[str] = set()
        self.rebound: dict[str, int] = {}

    def follow(self, source: str, cell: int):
        """Go on with the code of the cell of that number. Raises SyntaxError."""
        self._run(_Magics().visit(parse_cell(source)).body, cell)

    def _run(self, statements: list[ast.stmt], cell: int):
        for statement in statements:
            before, body, otherwise = set(self._held), [], []
            match statement:
                case (
                    ast.AugAssign(target=ast.Name(), value=used)  # passes the value on
                    | ast.AnnAssign(value=None, annotation=used)  # "name: int" binds nothing
                ):
                    statement = ast.Expr(used)
                case ast.For() | ast.AsyncFor() | ast.With() | ast.AsyncWith():
                    # In its body, a name that stands before it has its new value.
                    body, otherwise = statement.body, getattr(statement, "orelse", [])
                    statement.body, statement.orelse = [ast.Pass()], []
            self._use(statement, cell)
            after = before if isinstance(statement, _UNSURE) else set(self._held)
            self._run(body, cell)
            self._held = set(before)
            self._run(otherwise, cell)
            self._held = after

    def _use(self, statement: ast.stmt, cell: int):
        """What a statement reads, then what it binds."""
        source = ast.unparse(ast.fix_missing_locations(statement))
        module = symtable.symtable(source, "cell", "exec")
        for table in _with_inner(module):
            # What a class binds may be the module's until then.
            own = table is module or isinstance(table, symtable.Class)
            for symbol in table.get_symbols():
                if symbol.is_referenced() and (own or symbol.is_global()):
                    self.read |= {symbol.get_name()} & self._held
        walrus = [node for node in ast.walk(statement) if isinstance(node, ast.NamedExpr)]
        unsure = {node.target.id for node in walrus}  # as in "a and (b := c)"
        for symbol in module.get_symbols():
            name = symbol.get_name()
            if (symbol.is_assigned() or symbol.is_imported()) and name in self._held - unsure:
                self._held.remove(name)
                self.rebound.setdefault(name, cell)


def _with_inner(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _with_inner(inner)


class _Magics(ast.NodeTransformer):
    """Puts in place of a magic or shell command, as IPython rewrites it, the names it reads."""

    def visit_Call(self, node: ast.Call):
        match node:
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Call(func=ast.Name(id="get_ipython")),
                    attr="run_line_magic" | "run_cell_magic" | "system" | "getoutput",
                ),
                args=[ast.Constant(value=str(name)), *others],
            ):
                texts = [other.value for other in others if isinstance(other, ast.Constant)]
                if name not in _PYTHON_MAGICS:  # the body of another is passed on as it stands
                    texts = _EXPANDED.findall(" ".join([name, *texts[:1]]))
                words = _WORD.findall(" ".join(texts))
                return ast.Tuple([ast.Name(word) for word in words if not iskeyword(word)])
        return self.generic_visit(node)
