"""A notebook's parameters: how they are read, which values are accepted, and which can reach the
code."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbsweep.parameters import ParameterError, check_override, parse_notebook, parse_value
from nbsweep.registry import load_registry


def read_parameters(path):
    return parse_notebook(path).parameters


def override(path, name, value):
    return check_override(parse_notebook(path), name, value)


REGISTERED = [load_registry().folder / entry.file for entry in load_registry().notebook]
DEFAULTS = 'card = "L4"\ncount = 2\nshare = 0.5\ntrain = False\nlimits_gib = [12, 20]'


def parameters_cell(source=DEFAULTS):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


@pytest.fixture
def notebook(tmp_path):
    """Writes a notebook of a parameters cell and the given later cells; returns its path."""

    def write(*later, parameters=DEFAULTS):
        path = tmp_path / "01_tiny.ipynb"
        cells = [
            new_code_cell("import os"),
            parameters_cell(parameters),
            *map(new_code_cell, later),
        ]
        nbformat.write(new_notebook(cells=cells), path)
        return path

    return write


# The parameters cell


def test_parameters_are_read_in_order_with_their_types(notebook):
    path = notebook(
        parameters=(
            '# which card\ncard = "L4"; count = -2\nshare = 1e-3\ntrain = True\nlimits = [1,'
            " 2.5]\nno = []"
        )
    )
    found = read_parameters(path)
    assert list(found) == ["card", "count", "share", "train", "limits", "no"]
    assert found == {
        "card": "L4",
        "count": -2,
        "share": 0.001,
        "train": True,
        "limits": [1, 2.5],
        "no": [],
    }
    assert type(found["train"]) is bool


@pytest.mark.parametrize("path", REGISTERED, ids=lambda path: path.stem[:2])
def test_every_parameter_of_a_registered_notebook_reaches_its_code(path):
    parsed = parse_notebook(path)
    assert parsed.parameters
    for name, default in parsed.parameters.items():
        assert check_override(parsed, name, default) == default


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("count = 1 + 1", "line 1 .*'count = 1 \\+ 1'; expected name = a plain"),
        ("a = 1\nimport os", "line 2 .*'import os'"),
        ("print(1)", "'print\\(1\\)'"),
        ("a = b = 1", "'a = b = 1'"),
        ("a, b = 1, 2", "plain"),
        ("a: int = 1", "'a: int = 1'"),
        ("a += 1", "'a \\+= 1'"),
        ("a = None", "'a = None'"),
        ("a = (1, 2)", "plain"),
        ("a = {'b': 1}", "plain"),
        ("a = b'x'", "plain"),
        ("a = 1j", "plain"),
        ("a = f'{1}'", "plain"),
        ("a = [1, 'x']", "list of one"),
        ("a = [True]", "list of one"),
        ("a = [[1]]", "list of one"),
        ("a = 1e999", "finite"),
        ("a = 1\nb = 2\na = 3", "assigns a twice"),
        ("a = (", "not valid Python"),
        ("%matplotlib inline", "not valid Python"),
    ],
)
def test_anything_but_literal_assignments_is_refused_and_quoted(notebook, source, says):
    with pytest.raises(ParameterError, match=f"01_tiny.*{says}"):
        read_parameters(notebook(parameters=source))


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([new_code_cell("count = 2")], "has none"),
        ([parameters_cell(), parameters_cell()], "has 2 of them"),
        ([new_markdown_cell("x", metadata={"tags": ["parameters"]})], "no code"),
        (
            [parameters_cell(), new_code_cell("a = 1", metadata={"tags": ["injected-parameters"]})],
            "executed copy",
        ),
    ],
)
def test_a_notebook_without_exactly_one_parameters_cell_is_refused(tmp_path, cells, says):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    with pytest.raises(ParameterError, match=f"a.ipynb .*{says}"):
        read_parameters(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"print(1)", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a notebook of format 4"),
        (b'{"nbformat": 3, "worksheets": []}', "not a notebook of format 4"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "not a notebook of format 4"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}', "not a valid"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": "x"}', "not a valid"),
        (b'{"nbformat": 4, "nbformat_minor": "x", "metadata": {}, "cells": []}', "not a valid"),
        (
            (
                b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type":'
                b' "code"}]}'
            ),
            "not a valid",
        ),
    ],
)
def test_a_file_that_is_no_notebook_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "a.ipynb"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=f"a.ipynb is .*{says}"):
        read_parameters(path)


def test_a_notebook_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(ParameterError, match="none.ipynb cannot be read"):
        read_parameters(tmp_path / "none.ipynb")


def test_an_older_notebook_of_format_4_without_cell_ids_is_read_without_a_warning(
    tmp_path, recwarn
):
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {"tags": ["parameters"]},
        "outputs": [],
    }
    content = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [cell | {"source": ["a = 1\n", "b = 2"]}],
    }
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(content))
    assert read_parameters(path) == {"a": 1, "b": 2}
    assert not recwarn.list


# Names and types

READS = "print(card, count, share, train, limits_gib)"


def test_an_unknown_name_is_refused_with_a_suggestion_and_the_names_there_are(notebook):
    with pytest.raises(
        ParameterError,
        match="no parameter crad; did you mean card.*card, count, share, train, limits",
    ):
        override(notebook(READS), "crad", "T4")


def test_an_unknown_name_like_no_other_is_refused_without_a_suggestion(notebook):
    with pytest.raises(ParameterError, match="no parameter zzzzzz; it has card"):
        override(notebook(READS), "zzzzzz", 1)


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("card", "T4", "T4"),
        ("card", "", ""),
        ("count", 4, 4),
        ("share", 0.25, 0.25),
        ("share", 1, 1.0),
        ("train", True, True),
        ("limits_gib", [1], [1]),
        ("limits_gib", [], []),
    ],
)
def test_a_value_of_the_defaults_type_is_accepted_and_an_int_becomes_a_float_where_one_is_due(
    notebook, name, value, given
):
    result = override(notebook(READS), name, value)
    assert (result, type(result)) == (given, type(given))


def test_ints_in_a_list_of_floats_become_floats(notebook):
    (value,) = override(notebook("print(a)", parameters="a = [0.5]"), "a", [1])
    assert type(value) is float


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("card", 4, "4 is an int; expected a str, as the default of card in 01_tiny.ipynb is"),
        ("card", None, "None is a NoneType; expected a str"),
        ("count", True, "True is a bool; expected an int"),
        ("count", 2.0, "2.0 is a float; expected an int"),
        ("count", "2", "'2' is a str; expected an int"),
        ("share", True, "True is a bool; expected a float"),
        ("share", "0.5", "'0.5' is a str; expected a float"),
        ("share", float("nan"), "nan is no finite float"),
        ("share", float("inf"), "inf is no finite float"),
        ("share", 10**400, "is an int; expected a float"),
        ("train", 1, "1 is an int; expected a bool"),
        ("train", "true", "'true' is a str; expected a bool"),
        ("limits_gib", 12, "12 is an int; expected a list of int"),
        ("limits_gib", "12", "expected a list of int"),
        ("limits_gib", [1.5], "a list of float; expected a list of int"),
        ("limits_gib", [True], "other things.*; expected a list of int"),
        ("limits_gib", ["a"], "a list of str; expected a list of int"),
        ("limits_gib", [[1]], "other things"),
    ],
)
def test_a_value_of_another_type_is_refused(notebook, name, value, says):
    with pytest.raises(ParameterError, match=says):
        override(notebook(READS), name, value)


# Reaching the code


@pytest.mark.parametrize(
    "later",
    [
        "print(count)",
        "count",
        'f"{count}"',
        'f"{1:{count}}"',
        "count = count + 1",
        "count = count or 3",
        "count += 1\nprint(count)",
        "values[0] = count",
        "count[0] = 1",
        "def f():\n    return count",
        "def f():\n    def g():\n        return count\n    return g",
        "async def f():\n    await count",
        "def f(count=count): pass",
        "def f(x: count): pass",
        "@count\ndef f(): pass",
        "class A:\n    count = 1\n    def f(self): return count",
        "class A(count): pass",
        "f = lambda: count",
        "[count for _ in range(3)]",
        "[x for x in range(3) if x < count]",
        "[count for count in range(count)]",
        "{x: y for x in a for y in range(count)}",
        "for count in range(count): pass",
        "with open(count) as count: pass",
        "if card:\n    count = 1\nprint(count)",
        "if card:\n    count = 1\nelse:\n    print(count)",
        "if not count:\n    count = 1",
        "if card:\n    pass\nelse:\n    count = 1\nprint(count)",
        "if card:\n    count = 1\nelse:\n    pass\nprint(count)",
        "if card:\n    pass\nelif train:\n    count = 1\nelse:\n    count = 2\nprint(count)",
        "def f():\n    global count\n    print(count)\n    count = 1",
        "def f():\n    def g():\n        count = 1\n    return count",
        "try:\n    count = int(card)\nexcept ValueError:\n    pass\nprint(count)",
        "match card:\n    case 'a':\n        count = 1\nprint(count)",
        "match count:\n    case _: pass",
        "count: int\nprint(count)",
        "def f():\n    count = 3\nprint(count)",
        "def f(count): pass\nprint(count)",
        "[count for count in range(3)]\nprint(count)",
        "def f():\n    global count\n    count = 1\nprint(count)",
        "def f():\n    return count\ncount = 1\nf()",
        "await f(count)",
        "%time print(count)",
        "x = %time count",
        "%timeit -n 10 f(count)",
        "%%time\nprint(count)",
        "%%capture out\nprint(count)",
        "!echo {count}",
        "!echo $count",
        "files = !ls {count + 1}",
        "%cd {count}",
        "x = 1\n%matplotlib inline\n!ls\nprint(count)",
        "text = '\\d'\nprint(count)",
        # It may be read: whether the binding before it happens is not known.
        "%%time\ncount = 1\nprint(count)",
        "for _ in range(3):\n    count = 1\nprint(count)",
        "for count in []:\n    pass\nelse:\n    print(count)",
        "for _ in range(3):\n    print(count)\nelse:\n    count = 1",
        "while card:\n    count = 1\nprint(count)",
        "if card:\n    count = 1\nelse:\n    count = 2\nprint(count)",
        "if card and (count := 3):\n    pass\nprint(count)",
        "x = card or (count := 3)\nprint(count)",
        "[(count := x) for x in range(3)]\nprint(count)",
        "with suppress(KeyError):\n    count = f()\nprint(count)",
        "try:\n    print(count)\nexcept KeyError as count:\n    pass",
        "try:\n    f()\nexcept KeyError as count:\n    pass\nprint(count)",
        "try:\n    pass\nfinally:\n    count = 1\nprint(count)",
        "match card:\n    case [count]: pass\n    case _: print(count)",
        "match card:\n    case [count]: pass\nprint(count)",
        "@count\ndef count(): pass",
        "def count(x=count): pass",
        "class count(count): pass",
        "class A:\n    count = count",
    ],
)
def test_a_value_that_the_code_reads_is_accepted(notebook, later):
    assert override(notebook("x = 1", later), "count", 3) == 3


@pytest.mark.parametrize(
    "later",
    [
        "count = 1\nprint(count)",
        "count: int = 1\nprint(count)",
        "a, (count, *b) = f()\nprint(count)",
        "count += 1\ncount = 1\nprint(count)",
        "for count in range(3):\n    print(count)",
        "with open('a') as count:\n    print(count)",
        "import count\ncount.f()",
        "import os as count\ncount.f()",
        "import count.path\ncount.f()",
        "from os import path as count\nprint(count)",
        "def count(): pass\ncount()",
        "class count: pass\ncount()",
        "del count",
        "count = 1\ndef f():\n    return count",
    ],
)
def test_a_value_that_is_replaced_before_anything_reads_it_is_refused_and_the_cell_named(
    notebook, later
):
    with pytest.raises(
        ParameterError,
        match="parameter count of 01_tiny.ipynb .*code cell 4 gives the name another",
    ):
        override(notebook("x = 1", later), "count", 3)


@pytest.mark.parametrize(
    "later",
    [
        "print('count')",
        "# count",
        "x.count(3)",
        "f(count=3)",
        "count += 1",
        "def f(count):\n    return count",
        "def f():\n    count = 1\n    return count",
        "def f():\n    for count in range(3): print(count)",
        "f = lambda count: count",
        "[count for count in range(3)]",
        "{count: x for count, x in y}",
        "!echo count",
        "%cd count",
        "%%bash\necho $count",
        "count?",
        "global count",
    ],
)
def test_a_value_that_nothing_reads_is_refused(notebook, later):
    with pytest.raises(ParameterError, match="parameter count of 01_tiny.ipynb .*nothing reads it"):
        override(notebook("x = 1", later), "count", 3)


def test_a_read_before_the_parameters_cell_does_not_count(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(count)"), parameters_cell()]), path)
    with pytest.raises(ParameterError, match="nothing reads it"):
        override(path, "count", 3)


def test_a_read_in_one_cell_makes_a_rebinding_in_a_later_one_harmless(notebook):
    assert override(notebook("print(count)", "count = 5"), "count", 3) == 3


def test_a_markdown_cell_that_mentions_the_name_is_no_read(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[parameters_cell(), new_markdown_cell("print(count)")]), path)
    with pytest.raises(ParameterError, match="nothing reads it"):
        override(path, "count", 3)


def test_a_cell_that_is_not_python_is_named(notebook):
    with pytest.raises(
        ParameterError, match="01_tiny.ipynb: code cell 4 is not valid Python .*line 2"
    ):
        override(notebook("print(count)", "x = 1\ndef f(:"), "count", 3)


# The command line


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("T4", "L4", "T4"),
        ("", "L4", ""),
        ("12", "L4", "12"),
        ("true", False, True),
        ("false", True, False),
        ("True", False, True),
        ("False", True, False),
        ("12", 2, 12),
        ("-1", 2, -1),
        ("+1", 2, 1),
        (".5", 0.1, 0.5),
        ("0.25", 0.5, 0.25),
        ("1e5", 0.5, 100_000.0),
        ("3", 0.5, 3.0),
        ("[1, 2]", [12, 20], [1, 2]),
        ("[]", [12, 20], []),
        ('["a"]', ["b"], ["a"]),
        ("[1]", [0.5], [1.0]),
        ("[1]", [], [1]),
    ],
)
def test_text_becomes_a_value_of_the_defaults_type(text, default, value):
    result = parse_value(text, default)
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "default", "says"),
    [
        ("TRUE", False, "'TRUE' cannot be read as a bool; write true or false"),
        ("1", False, "a bool"),
        ("yes", False, "a bool"),
        ("", False, "a bool"),
        ("2.0", 2, "'2.0' cannot be read as an int; write a whole number"),
        ("true", 2, "an int"),
        ("1_000", 2, "an int"),
        (" 1", 2, "an int"),
        ("012", 2, "an int"),
        ("0x10", 2, "an int"),
        ("1e3", 2, "an int"),
        ("1.2.3", 0.5, "a float"),
        ("٣", 2, "an int"),
        ("9" * 5000, 2, "an int"),
        ("nan", 0.5, "a float; write a finite number"),
        ("inf", 0.5, "a float"),
        ("1e999", 0.5, "a float"),
        ("x", 0.5, "a float"),
        ("12, 20", [12, 20], r"a list of int; write a list of int in JSON, such as \[12, 20\]"),
        ("12", [12, 20], "a list of int"),
        ("[1.5]", [12, 20], "a list of int"),
        ("[true]", [12, 20], "a list of int"),
        ("[NaN]", [0.5], "a list of float"),
        ("[" * 100_000, [12, 20], "a list of int"),
    ],
)
def test_text_that_is_no_such_value_is_refused_with_what_to_write(text, default, says):
    with pytest.raises(ParameterError, match=says):
        parse_value(text, default)
