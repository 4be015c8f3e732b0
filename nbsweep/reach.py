"""Whether a value that a name holds reaches the code: the names' reads and rebindings, in the order
they happen."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPE = (*_FUNCTION, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_PYTHON_MAGICS = ("time", "timeit", "capture", "prun")
_WORD = re.compile(r"[^\W\d]\w*")
# What IPython puts values into, in the line of a magic and in a shell command.
_EXPANDED = re.compile(r"\{[^{}]*\}|\$\w+")


class Reach(ast.NodeVisitor):
    """Follows names through module-level code, cell after cell.

    What is decided where Python itself would have to run to know:

    - A function's, lambda's or class's body counts as run where it is defined; its own names are not the module's.
    - Of ``if``, ``match`` and ``try`` any branch may run: a name is rebound if it is in all of them.
    - A loop runs at least once, to its end: its target is rebound.
    - ``name += 1`` passes the value on: it is neither a read by itself nor a rebinding.
    - A magic that runs Python is followed; in other magics and ``!commands`` ``{name}`` and ``$name`` are reads.
    - ``globals()["name"]``, ``exec`` and ``import *`` are not looked into.

    Attributes:
        reached: names that were read while they held their first value.
        pending: names that may still hold it.
        rebound: the cell that gave a name another value on some path, for names that had not been
            read before.
    """

    def __init__(self, names: Iterable[str], parse: Callable[[str], ast.Module]):
        """names: those to follow. parse: makes the code inside magics a tree."""
        self.pending = set(names)
        self.reached: set[str] = set()
        self.rebound: dict[str, int] = {}
        self._parse = parse
        self._cell = 0
        self._in_class = False

    def follow(self, tree: ast.Module, cell: int) -> None:
        """Go on with the code of the cell of that number."""
        self._cell = cell
        self.visit(tree)

    def _read(self, name: str) -> None:
        if name in self.pending:
            self.reached.add(name)

    def _bind(self, *names: str) -> None:
        for name in self.pending.intersection(() if self._in_class else names):
            self.pending.discard(name)
            self.rebound.setdefault(name, self._cell)

    def _visit_all(self, *nodes: ast.AST | list | None) -> None:
        for node in nodes:
            if isinstance(node, list):
                self._visit_all(*node)
            elif node is not None:
                self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._read(node.id) if isinstance(node.ctx, ast.Load) else self._bind(node.id)

    def _visit_binding(self, node: ast.AST) -> None:
        self.generic_visit(node)
        self._bind(*_bound_by(node))

    visit_alias = visit_MatchAs = visit_MatchStar = visit_MatchMapping = _visit_binding

    # Where the fields of a node do not stand in the order in which they run.

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit_all(node.value, node.targets)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._visit_all(node.value, node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_all(node.annotation, node.value)
        if node.value is not None:  # "name: int" alone binds nothing
            self.visit(node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._visit_all(node.value, None if isinstance(node.target, ast.Name) else node.target)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._visit_all(node.iter, node.target, node.body, node.orelse)

    visit_AsyncFor = visit_For

    # Branches.

    def _either(self, *branches: list[ast.AST]) -> None:
        before, after = self.pending, set()
        for branch in branches:
            self.pending = set(before)
            self._visit_all(branch)
            after |= self.pending
        self.pending = after

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._either(node.body, node.orelse)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        self._either(*([case] for case in node.cases), [])

    def visit_Try(self, node: ast.Try) -> None:
        # A handler may start before the body's first statement has run.
        self._either(node.body + node.orelse, *([handler] for handler in node.handlers))
        self._visit_all(node.finalbody)

    visit_TryStar = visit_Try

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._visit_all(node.type)
        self._bind(*_bound_by(node))
        self._visit_all(node.body)

    # Scopes.

    def _inside(
        self, local: set[str], *nodes: ast.AST | list | None, in_class: bool = False
    ) -> set[str]:
        """Visit a scope with these names of its own, and leave it; returns what it bound outside
        itself."""
        outside, outer_class = self.pending, self._in_class
        self.pending, self._in_class = outside - local, in_class
        self._visit_all(*nodes)
        bound = outside - local - self.pending
        self.pending, self._in_class = outside, outer_class
        return bound

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Decorators, defaults and annotations are evaluated outside.
        self._visit_all(node.decorator_list, node.args, node.returns)
        self._bind(node.name)
        self._inside(_local_names(node), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self._inside(_local_names(node), node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all(node.decorator_list, node.bases, node.keywords)
        self._inside(set(), node.body, in_class=True)
        self._bind(node.name)

    def _visit_comprehension(self, node: ast.expr) -> None:
        first, *others = node.generators
        local = {
            name
            for generator in node.generators
            for part in ast.walk(generator.target)
            for name in _bound_by(part)
        }
        parts = [first.ifs, *([generator.iter, generator.ifs] for generator in others)]
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.visit(first.iter)
        # A walrus inside binds outside, and unlike a function's body this has run now.
        self.pending = self.pending - self._inside(local, *parts, results)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    # Magics, as IPython rewrites them.

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_ipython")), attr=method),
                args=[ast.Constant(value=str(first)), *others],
            ):
                texts = [other.value for other in others if isinstance(other, ast.Constant)]
                if method in ("run_line_magic", "run_cell_magic") and first in _PYTHON_MAGICS:
                    for text in texts:
                        self._follow_text(text)
                elif method in ("run_line_magic", "run_cell_magic", "system", "getoutput"):
                    # The body of a cell magic, the third text, is passed on as it stands.
                    for expression in _EXPANDED.findall(" ".join([first, *texts[:1]])):
                        self._read_words(expression)

    def _follow_text(self, text: str) -> None:
        try:
            self.visit(self._parse(text))
        except SyntaxError:  # such as options before the statement
            self._read_words(text)

    def _read_words(self, text: str) -> None:
        for word in _WORD.findall(text):
            self._read(word)


def _bound_by(node: ast.AST) -> list[str]:
    """The names that this node itself binds, or deletes, in the scope it stands in."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.alias():
            return [node.asname or node.name.partition(".")[0]]
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case (
            ast.FunctionDef(name=str(name))
            | ast.AsyncFunctionDef(name=str(name))
            | ast.ClassDef(name=str(name))
            | ast.ExceptHandler(name=str(name))
            | ast.MatchAs(name=str(name))
            | ast.MatchStar(name=str(name))
        ):
            return [name]
    return []


def _local_names(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    """A function's arguments and the names it binds, but for those it declares global."""
    local = {part.arg for part in ast.walk(function.args) if isinstance(part, ast.arg)}
    declared_global: set[str] = set()
    waiting = list(function.body) if isinstance(function.body, list) else [function.body]
    while waiting:
        node = waiting.pop()
        local.update(_bound_by(node))
        if isinstance(node, ast.Global):
            declared_global.update(node.names)
        if not isinstance(node, _SCOPE):
            waiting.extend(ast.iter_child_nodes(node))
    return local - declared_global
