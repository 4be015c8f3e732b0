"""Whether the code reads what a name holds before it gives the name another value."""

from __future__ import annotations

import ast
import re
import symtable
import warnings
from collections.abc import Iterable, Iterator
from keyword import iskeyword

from IPython.core.inputtransformer2 import TransformerManager

_COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")
_PYTHON_MAGICS = ("time", "timeit", "capture", "prun")
# What IPython puts values into, in the line of a magic and in a shell command.
_EXPANDED = re.compile(r"\{[^{}]*\}|\$\w+")
_WORD = re.compile(r"[^\W\d]\w*")


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
    """Follows names through module-level code, cell after cell, in the order things happen.

    The body of a function or class counts as run where it is defined. Of ``if``, ``match`` and
    ``try`` any branch may run; a loop runs once, to its end. ``name += 1`` passes the value on. Not
    looked into: ``globals()["name"]``, ``exec``, ``import *``.

    Attributes:
        read: names that were read while they held their first value.
        held: names that may still hold it.
        rebound: the cell that gave a name another value, for names that had not been read before.
    """

    def __init__(self, names: Iterable[str]):
        self.held = set(names)
        self.read: set[str] = set()
        self.rebound: dict[str, int] = {}
        self._cell = 0

    def follow(self, source: str, cell: int):
        """Go on with the code of the cell of that number. Raises SyntaxError."""
        self._cell = cell
        self._run(_Magics().visit(parse_cell(source)).body)

    def _run(self, statements: list[ast.stmt]):
        for statement in statements:
            match statement:
                case ast.If():
                    self._use(statement.test)
                    self._branch(([], statement.body), ([], statement.orelse))
                case ast.While() | ast.For() | ast.AsyncFor() | ast.With() | ast.AsyncWith():
                    # What stands before the body, alone.
                    alone = {name: getattr(statement, name) for name in statement._fields}
                    empty = {"orelse": []} if "orelse" in alone else {}
                    self._use(type(statement)(**alone | empty | {"body": [ast.Pass()]}))
                    self._run(statement.body + getattr(statement, "orelse", []))
                case ast.Match():
                    self._use(statement.subject)
                    cases = [(_pattern(case), case.body) for case in statement.cases]
                    self._branch(*cases, ([], []))
                case ast.Try() | ast.TryStar():
                    # A handler may start before the body's first statement has run.
                    handlers = [(_caught(each), each.body) for each in statement.handlers]
                    self._branch(([], statement.body + statement.orelse), *handlers)
                    self._run(statement.finalbody)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    self._bind({statement.name})  # before its body, which may name itself
                    self._use(statement)
                case ast.AugAssign(target=ast.Name()):
                    self._use(statement.value)
                case ast.AnnAssign(value=None):  # "name: int" alone binds nothing
                    self._use(statement.annotation)
                case _:
                    self._use(statement)

    def _branch(self, *branches: tuple[list[ast.AST], list[ast.stmt]]):
        """What happens if any one of them runs; each is what is evaluated first, then a body."""
        before, after = self.held, set()
        for first, body in branches:
            self.held = set(before)
            for node in first:
                self._use(node)
            self._run(body)
            after |= self.held
        self.held = after

    def _use(self, node: ast.AST):
        """What a node without statements of this scope inside reads, then what it binds."""
        module = symtable.symtable(ast.unparse(ast.fix_missing_locations(node)), "cell", "exec")
        bound = set()
        for table in _with_inner(module):
            for symbol in table.get_symbols():
                if not (table is module or symbol.is_global()):
                    continue  # a scope's own name
                if symbol.is_referenced() and symbol.get_name() in self.held:
                    self.read.add(symbol.get_name())
                # A walrus in a comprehension binds outside it; a function's body does when called.
                if table is module or table.get_name() in _COMPREHENSIONS:
                    if symbol.is_assigned() or symbol.is_imported():
                        bound.add(symbol.get_name())
        self._bind(bound)

    def _bind(self, names: set[str]):
        for name in self.held & names:
            self.held.discard(name)
            self.rebound.setdefault(name, self._cell)


def _with_inner(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _with_inner(inner)


def _pattern(case: ast.match_case) -> list[ast.AST]:
    alone = ast.match_case(case.pattern, case.guard, [ast.Pass()])
    return [ast.Match(ast.Constant(0), [alone])]


def _caught(handler: ast.ExceptHandler) -> list[ast.AST]:
    name = ast.Name(handler.name or "_")
    return [ast.Assign([name], handler.type or ast.Constant(0))]


class _Magics(ast.NodeTransformer):
    """Puts in place of a magic, as IPython rewrites it, the Python in it or the names it reads."""

    def visit_Expr(self, node: ast.Expr):
        name, texts = _magic(node.value)
        if name in _PYTHON_MAGICS:
            try:
                # Of a cell magic the last text is the cell.
                return self.visit(parse_cell(texts[-1])).body
            except SyntaxError:  # such as options before the statement
                pass
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call):
        name, texts = _magic(node)
        if name is None:
            return self.generic_visit(node)
        # The body of a cell magic that is no Python is passed on as it stands.
        read = texts if name in _PYTHON_MAGICS else _EXPANDED.findall(" ".join([name, *texts[:1]]))
        names = [ast.Name(word) for word in _WORD.findall(" ".join(read)) if not iskeyword(word)]
        return ast.Tuple(names)


def _magic(node: ast.AST) -> tuple[str | None, list[str]]:
    """The name of a magic, or the shell command, and its texts; None for any other node."""
    match node:
        case ast.Call(
            func=ast.Attribute(
                value=ast.Call(func=ast.Name(id="get_ipython")),
                attr="run_line_magic" | "run_cell_magic" | "system" | "getoutput",
            ),
            args=[ast.Constant(value=str(name)), *others],
        ):
            return name, [other.value for other in others if isinstance(other, ast.Constant)]
    return None, []
