"""Sweep files: what they expand to, and that each mistake is found before anything runs and says
where it is."""

import json
import math
import textwrap

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from nbsweep.registry import Registry, load_registry
from nbsweep.sweepfile import MOST_RUNS, SweepFileError, read_sweep_file

FIRST = (
    'card = "L4"\ncount = 2\nshare = 0.5\ntrain = False\nlimits_gib = [12, 20]\nunread ='
    " 1\nreplaced = 1"
)
READS = "print(card, count, share, train, limits_gib)\nreplaced = 2"


def entry(file, title, tier="core", hardware="simulated or 1+ GPUs"):
    return {
        "file": file,
        "title": title,
        "tier": tier,
        "hardware": hardware,
        "timeout_seconds": 300,
        "minutes": 1,
    }


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Registry:
    """Three tiny notebooks: the first has one parameter of each type."""
    directory = tmp_path_factory.mktemp("notebooks")
    entries = [
        entry("01_first.ipynb", "First"),
        entry("02_second.ipynb", "Second", tier="extra", hardware="1+ GPUs"),
        entry("03_without.ipynb", "Without parameters"),
    ]
    for item, (parameters, later) in zip(
        entries, [(FIRST, READS), ("seed = 0", "seed"), (None, "1")], strict=True
    ):
        cells = [new_code_cell(later)]
        if parameters:
            cells.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        nbformat.write(new_notebook(cells=cells), directory / item["file"])
    return Registry.model_validate({"notebook": entries, "folder": directory})


@pytest.fixture
def read(suite, tmp_path):
    """Writes a sweep file of that text; its name and its runs, read against the tiny notebooks."""

    def read_text(text, name="fit.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return read_sweep_file(path, suite)

    return read_text


@pytest.fixture
def runs_of(read):
    """The notebook's name, parameters and time limit of every run of a sweep file of that text."""

    def runs(text):
        return [
            (run.notebook.path.name, run.parameters, run.timeout_seconds) for run in read(text)[1]
        ]

    return runs


@pytest.fixture
def parameters(runs_of):
    """The parameters of every run that a sweep of one entry, given as TOML, expands to."""

    def expanded(text):
        return [given for _, given, _ in runs_of(f'[[runs]]\nnotebook = "01"\n{text}')]

    return expanded


# What a sweep expands to


def test_an_entry_without_parameters_is_one_run_with_the_defaults(runs_of):
    assert runs_of('[[runs]]\nnotebook = "01"') == [("01_first.ipynb", {}, 300.0)]


def test_an_entry_with_set_alone_is_one_run(parameters):
    assert parameters("set = {count = 4, train = true}") == [{"count": 4, "train": True}]


def test_a_grid_is_every_combination_and_its_last_name_varies_first(parameters):
    assert parameters('grid = {card = ["L4", "T4"], count = [1, 3]}') == [
        {"card": "L4", "count": 1},
        {"card": "L4", "count": 3},
        {"card": "T4", "count": 1},
        {"card": "T4", "count": 3},
    ]


def test_zipped_values_go_together(parameters):
    assert parameters('zip.card = ["L4", "H100"]\nzip.count = [4, 1]') == [
        {"card": "L4", "count": 4},
        {"card": "H100", "count": 1},
    ]


def test_a_list_is_taken_as_it_stands(parameters):
    assert parameters('list = [{card = "L4", count = 4}, {card = "T4"}]') == [
        {"card": "L4", "count": 4},
        {"card": "T4"},
    ]


def test_grid_zip_list_and_set_of_one_entry_are_multiplied(parameters):
    runs = parameters(
        'list = [{train = true}, {train = false}]\nzip.card = ["T4", "H100"]\nzip.count = [4, 1]\n'
        "grid.limits_gib = [[1], [2, 3]]\nset.share = 1"
    )
    assert len(runs) == 8
    assert runs[0] == {"share": 1.0, "limits_gib": [1], "card": "T4", "count": 4, "train": True}
    assert runs[1] == runs[0] | {"train": False}
    assert runs[2] == runs[0] | {"card": "H100", "count": 1}
    assert runs[4] == runs[0] | {"limits_gib": [2, 3]}


def test_a_given_int_becomes_a_float_where_the_default_is_one(parameters):
    (run,) = parameters("set.share = 1")
    assert type(run["share"]) is float


def test_entries_keep_their_order_and_a_notebook_may_stand_in_several(runs_of):
    text = "[[runs]]\nnotebook = {}\n"
    runs = runs_of(
        text.format(2) + text.format('"1"') + "set.count = 5\n" + text.format('"01_first.ipynb"')
    )
    assert [run[:2] for run in runs] == [
        ("02_second.ipynb", {}),
        ("01_first.ipynb", {"count": 5}),
        ("01_first.ipynb", {}),
    ]


def test_a_notebook_may_be_named_by_its_path_from_the_files_folder(read, suite, tmp_path):
    (tmp_path / "targets").mkdir()
    content = (suite.folder / "01_first.ipynb").read_bytes()
    (tmp_path / "targets" / "mine.ipynb").write_bytes(content)
    ((run),) = read('[[runs]]\nnotebook = "targets/mine.ipynb"\nset.count = 3')[1]
    assert (run.notebook.entry.title, run.timeout_seconds) == ("mine", 300.0)
    text = 'file = "mine.ipynb"\ntitle = "M"\ntier = "extra"\nhardware = "any"\nminutes = 1\n'
    (tmp_path / "targets" / "registry.toml").write_text(
        f'packages = ["a"]\n[[notebook]]\n{text}timeout_seconds = 7'
    )
    ((run),) = read('[[runs]]\nnotebook = "targets/mine.ipynb"\nset.count = 3')[1]
    assert (run.notebook.entry.title, run.timeout_seconds) == ("M", 7.0)
    assert run.notebook.registry.packages == ["a"]


def test_a_timeout_in_the_file_replaces_the_registrys(runs_of):
    text = '[[runs]]\nnotebook = "01"\ntimeout_seconds = 1.5\n[[runs]]\nnotebook = "02"'
    assert [seconds for *_, seconds in runs_of(text)] == [1.5, 300.0]


def test_the_name_is_the_files_unless_the_file_gives_one(read):
    assert read('[[runs]]\nnotebook = "01"', "a_sweep-2.toml")[0] == "a_sweep-2"
    named = 'name = "other"\n[[runs]]\nnotebook = "01"'
    assert read(named, "A sweep.toml")[0] == "other"


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ('tier = "core"', ["01_first.ipynb"]),
        ('tier = "extra"', ["02_second.ipynb"]),
        ('hardware = "simulated"', ["01_first.ipynb"]),
        ('hardware = "GPUs"', ["01_first.ipynb", "02_second.ipynb"]),
        ('tier = "extra"\nhardware = "GPUs"', ["02_second.ipynb"]),
    ],
)
def test_filters_leave_the_entries_whose_notebook_matches_all_of_them(runs_of, filters, left):
    runs = runs_of(f'{filters}\n[[runs]]\nnotebook = "01"\n[[runs]]\nnotebook = "02"')
    assert [run[0] for run in runs] == left


def test_an_entry_that_a_filter_leaves_out_is_checked_all_the_same(read):
    text = 'tier = "core"\n[[runs]]\nnotebook = "01"\n[[runs]]\nnotebook = "02"\nset.sed = 1'
    with pytest.raises(SweepFileError, match=r"runs\[1\].set.sed"):
        read(text)


def test_exactly_as_many_runs_as_allowed_are_accepted(parameters):
    counts = list(range(MOST_RUNS // 10))
    assert len(parameters(f"grid = {{count = {counts}, share = {counts[:10]}}}")) == MOST_RUNS


def test_quoted_text_that_looks_like_something_else_is_text(parameters):
    cards = ["no", "on", "012", "1:30", "2024-01-01", "null", "true", "1e5", "~", "", "*a", "2"]
    assert [run["card"] for run in parameters(f"grid.card = {json.dumps(cards)}")] == cards


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cards=st.lists(
        st.sampled_from(["L4", "T4", "H100", "no", "012", "1e5"]), max_size=4, unique=True
    ),
    counts=st.lists(st.integers(-(10**18), 10**18), max_size=4, unique=True),
    pairs=st.lists(
        st.tuples(st.booleans(), st.floats(-1e300, 1e300)),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ),
    limits=st.lists(st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3, unique=True),
)
def test_the_number_of_runs_is_the_product_of_the_lengths(parameters, cards, counts, pairs, limits):
    lines = [f"grid.{name} = {json.dumps(values)}"
             for name, values in (("card", cards), ("count", counts)) if values]  # fmt: skip
    if pairs:
        lines.append(f"zip.train = {json.dumps([train for train, _ in pairs])}")
        lines.append(f"zip.share = {[share for _, share in pairs]}")
    if limits:
        rows = ", ".join(f"{{limits_gib = {list(values)}}}" for values in limits)
        lines.append(f"list = [{rows}]")
    runs = parameters("\n".join(lines))
    assert len(runs) == math.prod(max(1, len(values)) for values in (cards, counts, pairs, limits))
    assert len({str(run) for run in runs}) == len(runs)


def test_the_registered_notebooks_take_a_sweep_of_real_parameters(tmp_path):
    path = tmp_path / "fit.toml"
    path.write_text(
        textwrap.dedent("""\
            tier = "core"
            hardware = "simulated"

            [[runs]]
            notebook = "01"
            grid = {card = ["L4", "T4"], count = [1, 2]}
            set.new_tokens = 16

            [[runs]]
            notebook = "03_auto_device_map.ipynb"
            grid.limits_gib = [[12, 20], [20, 12]]
            timeout_seconds = 120
            """)
    )
    _, runs = read_sweep_file(path, load_registry())
    assert runs[0].notebook.path.name == "01_will_it_fit.ipynb"
    assert (runs[0].notebook.entry.title, runs[0].timeout_seconds) == ("Will it fit?", 300.0)
    assert runs[0].parameters == {"new_tokens": 16, "card": "L4", "count": 1}
    assert [run.parameters for run in runs[4:]] == [
        {"limits_gib": [12, 20]},
        {"limits_gib": [20, 12]},
    ]
    assert len(runs) == 6


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            '{crad = ["T4"]}',
            (
                r"runs\[0\].grid.crad\[0\]: 01_will_it_fit.ipynb has no parameter crad; did you"
                r" mean card"
            ),
        ),
        ('{count = [1, "two"]}', r"runs\[0\].grid.count\[1\]: 'two' is a str; expected an int"),
    ],
)
def test_a_mistake_about_a_registered_notebook_names_the_entry_and_the_notebook(
    tmp_path, value, says
):
    path = tmp_path / "fit.toml"
    path.write_text(f'[[runs]]\nnotebook = "01"\ngrid = {value}')
    with pytest.raises(SweepFileError, match=says):
        read_sweep_file(path, load_registry())


# Bad files: the text, and how the error goes on after the file's name. RUN stands for an entry of
# notebook 01, FIRST_RUN for one without parameters.

FIRST_RUN = '[[runs]]\nnotebook = "01"\n'
RUN = FIRST_RUN + "%s"
BAD_FILES = {
    # Not the TOML of a sweep
    "empty file": ("", "runs: is missing; add it"),
    "only a comment": ("# nothing", "runs: is missing"),
    "text at the top": ("hello", "not valid TOML: .*after a key.*; correct that line"),
    "syntax error": (
        'name = "fit"\nruns = [{notebook = "01"}\ntier = "core"\n',
        "not valid TOML: .*line 3.*; correct that line",
    ),
    "control character": ('name = "fit"\nruns = \x00', "not valid TOML: .*line 2"),
    "not UTF-8": (b'name = "\xff"', "not text in UTF-8"),
    "too deep": ("runs = " + "[" * 5000, "nested too deeply"),
    # Keys
    "key twice": ('name = "a"\nruns = []\nname = "b"', "not valid TOML: .*; correct that line"),
    "key twice further down": (
        RUN % "grid = {count = [1], count = [2]}",
        "not valid TOML: .*line 3",
    ),
    "unknown key": (
        '[[run]]\nnotebook = "01"',
        "run: unknown key; did you mean runs.* name, runs, tier, hardware",
    ),
    "unknown key of a run": (
        RUN % "gird.count = [1]",
        r"runs\[0\].gird: unknown key; did you mean grid.* notebook, ",
    ),
    "unknown key like no other": (
        RUN % "xyz = 1",
        r"runs\[0\].xyz: unknown key; the keys here are notebook, grid, zip, ",
    ),
    "key of the code": (
        RUN % "zipped.count = [1]",
        r"runs\[0\].zipped: unknown key; did you mean zip",
    ),
    # name, runs, filters
    "no runs": ('name = "fit"', "runs: is missing"),
    "empty runs": ("runs = []", "runs: .* expected at least one element"),
    "runs left open": ("runs =", "not valid TOML: .*Invalid value"),
    "runs as a table": ('[runs]\nnotebook = "01"', "runs: .* expected a list"),
    "run as text": ('runs = ["01"]', r"runs\[0\]: '01' .* expected a table such as"),
    "name with a space": (
        'name = "my sweep"\n' + FIRST_RUN,
        "name: 'my sweep' .*expected only a-z",
    ),
    "name that climbs": ('name = "../x"\n' + FIRST_RUN, "name: '../x' .*expected only a-z"),
    "name as a number": ("name = 12\n" + FIRST_RUN, "name: 12 .*expected text"),
    "name as a bool": ("name = false\n" + FIRST_RUN, "name: False .*expected text"),
    "unknown tier": ('tier = "hard"\n' + FIRST_RUN, "tier: 'hard' .*expected core or extra"),
    "empty hardware": ('hardware = ""\n' + FIRST_RUN, "hardware: '' .*expected some text"),
    "tier leaves nothing": (
        'tier = "extra"\n' + FIRST_RUN,
        "tier extra: no notebook of the runs is left",
    ),
    "filters leave nothing": (
        'tier = "core"\nhardware = "H100"\n' + FIRST_RUN,
        "tier core and hardware H100: no notebook of the runs is left",
    ),
    # The notebook
    "no notebook": ("[[runs]]\nset.count = 1", r"runs\[0\].notebook: is missing"),
    "unknown number": (
        '[[runs]]\nnotebook = "17"',
        r"runs\[0\].notebook: no notebook '17' .* has 01, 02, 03",
    ),
    "unknown file": (
        '[[runs]]\nnotebook = "01_frist.ipynb"',
        r"runs\[0\].notebook: .*did you mean 01_first.ipynb",
    ),
    "number without quotes": ("[[runs]]\nnotebook = 01", "not valid TOML: .*line 2"),
    "notebook as a list": ('[[runs]]\nnotebook = ["01"]', r"runs\[0\].notebook: .*expected text"),
    "notebook as a bool": (
        "[[runs]]\nnotebook = true",
        r"runs\[0\].notebook: True .*expected text",
    ),
    "notebook without parameters": (
        '[[runs]]\nnotebook = "03"',
        "03_without.ipynb needs exactly one code cell",
    ),
    # Sections of a run
    "timeout of zero": (
        RUN % "timeout_seconds = 0",
        r"runs\[0\].timeout_seconds: 0 .*expected a positive number",
    ),
    "timeout as text": (
        RUN % 'timeout_seconds = "2m"',
        r"runs\[0\].timeout_seconds: '2m' .*expected a positive number",
    ),
    "timeout as a bool": (
        RUN % "timeout_seconds = true",
        r"runs\[0\].timeout_seconds: True .*expected a positive number",
    ),
    "timeout as a time of day": (
        RUN % "timeout_seconds = 01:30:00",
        r"runs\[0\].timeout_seconds: datetime.time.* expected a positive number",
    ),
    "timeout without end": (
        RUN % "timeout_seconds = inf",
        r"runs\[0\].timeout_seconds: inf .*expected a positive number",
    ),
    "empty grid": (RUN % "grid = {}", r"runs\[0\].grid: .*at least one element"),
    "empty grid list": (RUN % "grid.count = []", r"runs\[0\].grid.count: .*at least one element"),
    "grid as a list": (RUN % "grid = [1, 2]", r"runs\[0\].grid: .*expected a table of names"),
    "single grid value": (
        RUN % 'grid.card = "T4"',
        r"runs\[0\].grid.card: 'T4' .*expected a list such as",
    ),
    "unequal zip": (
        RUN % 'zip = {card = ["a", "b"], count = [1]}',
        r"runs\[0\].zip: card has 2, count has 1; expected as many",
    ),
    "empty list": (RUN % "list = []", r"runs\[0\].list: .*at least one element"),
    "empty row of a list": (RUN % "list = [{}]", r"runs\[0\].list\[0\]: .*at least one element"),
    "list of values": (RUN % "list = [1, 2]", r"runs\[0\].list\[0\]: 1 .*expected a table"),
    "set as a list": (RUN % 'set = ["count"]', r"runs\[0\].set: .*expected a table"),
    "name in grid and set": (
        RUN % "grid.count = [1]\nset.count = 2",
        r"runs\[0\].grid.count: .*in set too; remove",
    ),
    "name in grid and list": (
        RUN % "grid.count = [1]\nlist = [{count = 2}]",
        r"runs\[0\].list.count: .*in grid too",
    ),
    "name in grid and zip": (
        RUN % "grid.count = [1]\nzip.count = [2]",
        r"runs\[0\].zip.count: .*in grid too",
    ),
    # Values
    "unknown parameter": (
        RUN % 'grid.crad = ["L4"]',
        r"runs\[0\].grid.crad\[0\]: 01_first.* no parameter crad; .* card\?",
    ),
    "later value of a grid": (
        RUN % "grid.count = [1, 2.5]",
        r"runs\[0\].grid.count\[1\]: 2.5 is a float; expected an int",
    ),
    "value of a zip": (
        RUN % "zip.count = [true]",
        r"runs\[0\].zip.count\[0\]: True is a bool; expected an int",
    ),
    "value of a list": (
        RUN % "list = [{count = 1}, {train = 1}]",
        r"runs\[0\].list\[1\].train: 1 is an int; expected a bool",
    ),
    "value of a set": (
        RUN % 'set.train = "true"',
        r"runs\[0\].set.train: 'true' is a str; .*without quotes",
    ),
    "number for text": (
        RUN % "grid.card = [4090]",
        r'grid.card\[0\]: 4090 is an int; .*quote it if text is meant: "4090"',
    ),
    "bool for text": (
        RUN % "set.card = true",
        r'set.card: True is a bool; .*quote it if text is meant: "true"',
    ),
    "list without its own brackets": (
        RUN % "grid.limits_gib = [12, 20]",
        r"limits_gib\[0\]: 12 .*a list of its own",
    ),
    "table as a value": (RUN % "set.count = {a = 1}", r"set.count: .* is a dict; expected an int"),
    "no for text": (RUN % "set.card = no", "not valid TOML: .*Invalid value.*line 3"),
    "on for a bool": (RUN % "set.train = on", "not valid TOML: .*Invalid value.*line 3"),
    "octal number": (RUN % "set.count = 012", "not valid TOML: .*line 3"),
    "date": (
        RUN % "set.card = 2024-01-01",
        r'set.card: datetime.date.* is a date; .*quote it if text is meant: "2024-01-01"',
    ),
    "impossible date": (RUN % "set.card = 2024-13-41", "not valid TOML: .*line 3"),
    "null": (RUN % "set.card = null", "not valid TOML: .*Invalid value"),
    "not a number": (RUN % "set.share = nan", r"set.share: nan is no finite float"),
    "beyond the largest float": (RUN % "set.share = 1e999", r"set.share: inf is no finite float"),
    "five thousand digits": (RUN % ("set.count = %s" % ("9" * 5000)), "not valid TOML: .*digits"),
    "unread parameter": (
        RUN % "set.unread = 2",
        r"runs\[0\].set.unread: .* of 01_first.ipynb .*nothing reads it",
    ),
    "replaced parameter": (
        RUN % "set.replaced = 2",
        r"runs\[0\].set.replaced: .*code cell 2 gives the name another",
    ),
    # The runs together
    "value twice": (
        RUN % "grid.count = [1, 1]",
        r"runs\[0\] \(its run 2\) repeats runs\[0\] \(its run 1\): .*count=1",
    ),
    "float twice": (
        RUN % "grid.share = [1, 1.0]",
        r"runs\[0\] \(its run 2\) repeats runs\[0\] \(its run 1\)",
    ),
    "run twice": (
        f'{RUN % "set.count = 3"}\n[[runs]]\nnotebook = "02"\n{RUN % "grid.count = [4, 3]"}',
        (
            r"runs\[2\] \(its run 2\) repeats runs\[0\] \(its run 1\): 01_first.ipynb with count=3;"
            r" remove one"
        ),
    ),
    "defaults twice": (
        f"{RUN % 'set.count = 2'}\n{FIRST_RUN}",
        r"runs\[1\] .* repeats runs\[0\] .*: 01_first.ipynb with the defaults",
    ),
    "too many runs": (
        RUN % f"grid = {{count = {list(range(1001))}, share = {list(range(10))}}}",
        "runs: 10,010 runs are planned; expected at most 10,000",
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_file_and_entry(read, tmp_path, text, says):
    with pytest.raises(SweepFileError, match=says) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'fit.toml'}: ")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["fit.yaml", "fit.yml"])
def test_a_yaml_file_is_refused_with_the_form_that_is_expected(read, name):
    with pytest.raises(SweepFileError, match=rf"{name}: sweep files are TOML .*\[\[runs\]\]"):
        read("runs:\n  - notebook: '01'\n", name)


def test_too_many_runs_are_refused_without_being_expanded(read):
    # A billion runs: had they been expanded, memory would have run out.
    numbers = list(range(1000))
    cards = json.dumps([f"c{n}" for n in numbers])
    with pytest.raises(SweepFileError, match="runs: 1,000,000,000 runs are planned"):
        read(RUN % f"grid = {{count = {numbers}, share = {numbers}, card = {cards}}}")


def test_a_file_name_that_cannot_be_a_sweeps_name_is_refused(read):
    with pytest.raises(SweepFileError, match="name: 'My Sweep' .the file's name where none is"):
        read(FIRST_RUN, "My Sweep.toml")


def test_a_file_that_does_not_exist_is_refused_by_name(suite, tmp_path):
    with pytest.raises(SweepFileError, match="none.toml: cannot be read .No such file"):
        read_sweep_file(tmp_path / "none.toml", suite)


def test_a_folder_is_refused_by_name(suite, tmp_path):
    with pytest.raises(SweepFileError, match="cannot be read .Is a directory"):
        read_sweep_file(tmp_path, suite)


def test_a_notebook_that_is_registered_but_absent_is_named(suite, tmp_path):
    path = tmp_path / "fit.toml"
    path.write_text(FIRST_RUN)
    with pytest.raises(SweepFileError, match="fit.toml: .*01_first.ipynb cannot be read"):
        read_sweep_file(path, suite.model_copy(update={"folder": tmp_path}))
