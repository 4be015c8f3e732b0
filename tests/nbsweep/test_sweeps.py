"""Sweep files: what they expand to, and that each mistake is found before anything runs and says
where it is."""

import math
import textwrap
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from nbsweep.registry import DEFAULT_REGISTRY, Registry, load_registry
from nbsweep.sweeps import MOST_RUNS, PlannedRun, SweepError, expand, read_sweep_file

NOTEBOOKS = DEFAULT_REGISTRY.parent
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
def suite(tmp_path_factory) -> tuple[Path, Registry]:
    """Three tiny notebooks and their registry: the first has one parameter of each type."""
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
    return directory, Registry.model_validate({"notebook": entries})


@pytest.fixture
def read(suite, tmp_path):
    """Writes a sweep file of that text and reads it against the tiny notebooks."""

    def read_text(text, name="fit.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return read_sweep_file(path, *suite)

    return read_text


@pytest.fixture
def parameters(read):
    """The parameters of every run that a sweep of one entry, given as YAML, expands to."""

    def expanded(text):
        return [run.parameters for run in expand(read(f'runs: [{{notebook: "01", {text}}}]'))]

    return expanded


# What a sweep expands to


def test_an_entry_without_parameters_is_one_run_with_the_defaults(read):
    assert expand(read('runs: [{notebook: "01"}]')) == [
        PlannedRun("01_first.ipynb", "First", {}, 300.0)
    ]


def test_an_entry_with_set_alone_is_one_run(parameters):
    assert parameters("set: {count: 4, train: true}") == [{"count": 4, "train": True}]


def test_a_grid_is_every_combination_and_its_last_name_varies_first(parameters):
    assert parameters("grid: {card: [L4, T4], count: [1, 3]}") == [
        {"card": "L4", "count": 1},
        {"card": "L4", "count": 3},
        {"card": "T4", "count": 1},
        {"card": "T4", "count": 3},
    ]


def test_zipped_values_go_together(parameters):
    assert parameters("zip: {card: [L4, H100], count: [4, 1]}") == [
        {"card": "L4", "count": 4},
        {"card": "H100", "count": 1},
    ]


def test_a_list_is_taken_as_it_stands(parameters):
    assert parameters("list: [{card: L4, count: 4}, {card: T4}]") == [
        {"card": "L4", "count": 4},
        {"card": "T4"},
    ]


def test_grid_zip_list_and_set_of_one_entry_are_multiplied(parameters):
    runs = parameters(
        "list: [{train: true}, {train: false}], zip: {card: [T4, H100], count: [4, 1]},"
        " grid: {limits_gib: [[1], [2, 3]]}, set: {share: 1}"
    )
    assert len(runs) == 8
    assert runs[0] == {"share": 1.0, "limits_gib": [1], "card": "T4", "count": 4, "train": True}
    assert runs[1] == runs[0] | {"train": False}
    assert runs[2] == runs[0] | {"card": "H100", "count": 1}
    assert runs[4] == runs[0] | {"limits_gib": [2, 3]}


def test_a_given_int_becomes_a_float_where_the_default_is_one(parameters):
    (run,) = parameters("set: {share: 1}")
    assert type(run["share"]) is float


def test_entries_keep_their_order_and_a_notebook_may_stand_in_several(read):
    runs = expand(
        read("runs: [{notebook: 2}, {notebook: '1', set: {count: 5}}, {notebook: 01_first.ipynb}]")
    )
    assert [(run.notebook, run.parameters) for run in runs] == [
        ("02_second.ipynb", {}),
        ("01_first.ipynb", {"count": 5}),
        ("01_first.ipynb", {}),
    ]


def test_a_timeout_in_the_file_replaces_the_registrys(read):
    runs = expand(read("runs: [{notebook: '01', timeout_seconds: 1.5}, {notebook: '02'}]"))
    assert [run.timeout_seconds for run in runs] == [1.5, 300.0]


def test_the_name_is_the_files_unless_the_file_gives_one(read):
    assert read("runs: [{notebook: '01'}]", "a_sweep-2.yaml").name == "a_sweep-2"
    assert read("name: other\nruns: [{notebook: '01'}]", "A sweep.yaml").name == "other"


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ("tier: core", ["01_first.ipynb"]),
        ("tier: extra", ["02_second.ipynb"]),
        ("hardware: simulated", ["01_first.ipynb"]),
        ("hardware: GPUs", ["01_first.ipynb", "02_second.ipynb"]),
        ("tier: extra\nhardware: GPUs", ["02_second.ipynb"]),
    ],
)
def test_filters_leave_the_entries_whose_notebook_matches_all_of_them(read, filters, left):
    sweep = read(f"runs: [{{notebook: '01'}}, {{notebook: '02'}}]\n{filters}")
    assert [run.notebook for run in expand(sweep)] == left


def test_an_entry_that_a_filter_leaves_out_is_checked_all_the_same(read):
    with pytest.raises(SweepError, match=r"runs\[1\].set.sed"):
        read("runs: [{notebook: '01'}, {notebook: '02', set: {sed: 1}}]\ntier: core")


def test_exactly_as_many_runs_as_allowed_are_accepted(read):
    counts = list(range(MOST_RUNS // 10))
    assert (
        len(
            expand(
                read(f"runs: [{{notebook: '01', grid: {{count: {counts}, share: {counts[:10]}}}}}]")
            )
        )
        == MOST_RUNS
    )


def test_quoted_text_that_looks_like_something_else_is_text(parameters):
    cards = ["no", "on", "012", "1:30", "2024-01-01", "null", "true", "1e5", "~", "", "*a", "2"]
    quoted = ", ".join(f'"{card}"' for card in cards)
    assert [run["card"] for run in parameters(f"grid: {{card: [{quoted}]}}")] == cards


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cards=st.lists(
        st.sampled_from(["L4", "T4", "H100", "no", "012", "1e5"]), max_size=4, unique=True
    ),
    counts=st.lists(st.integers(-(10**20), 10**20), max_size=4, unique=True),
    pairs=st.lists(
        st.tuples(st.booleans(), st.floats(-1e300, 1e300)),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ),
    limits=st.lists(st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3, unique=True),
)
def test_the_number_of_runs_is_the_product_of_the_lengths(read, cards, counts, pairs, limits):
    grid = {name: values for name, values in (("card", cards), ("count", counts)) if values}
    run = {"notebook": "01"}
    if grid:
        run["grid"] = grid
    if pairs:
        run["zip"] = {
            "train": [train for train, _ in pairs],
            "share": [share for _, share in pairs],
        }
    if limits:
        run["list"] = [{"limits_gib": list(values)} for values in limits]
    runs = expand(read(yaml.safe_dump({"runs": [run]})))
    assert len(runs) == math.prod(max(1, len(values)) for values in (cards, counts, pairs, limits))
    assert len({str(run.parameters) for run in runs}) == len(runs)


def test_the_registered_notebooks_take_a_sweep_of_real_parameters(tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text(
        textwrap.dedent("""\
            runs:
              - notebook: "01"
                grid: {card: [L4, T4], count: [1, 2]}
                set: {new_tokens: 16}
              - notebook: 03_auto_device_map.ipynb
                grid: {limits_gib: [[12, 20], [20, 12]]}
                timeout_seconds: 120
            tier: core
            hardware: simulated
            """)
    )
    runs = expand(read_sweep_file(path, NOTEBOOKS, load_registry()))
    assert runs[0] == PlannedRun(
        "01_will_it_fit.ipynb", "Will it fit?", {"new_tokens": 16, "card": "L4", "count": 1}, 300.0
    )
    assert [run.parameters for run in runs[4:]] == [
        {"limits_gib": [12, 20]},
        {"limits_gib": [20, 12]},
    ]
    assert len(runs) == 6


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "{crad: [T4]}",
            (
                r"runs\[0\].grid.crad\[0\]: 01_will_it_fit.ipynb has no parameter crad; did you"
                r" mean card"
            ),
        ),
        ("{count: [1, two]}", r"runs\[0\].grid.count\[1\]: 'two' is a str; expected an int"),
    ],
)
def test_a_mistake_about_a_registered_notebook_names_the_entry_and_the_notebook(
    tmp_path, value, says
):
    path = tmp_path / "fit.yaml"
    path.write_text(f'runs: [{{notebook: "01", grid: {value}}}]')
    with pytest.raises(SweepError, match=says):
        read_sweep_file(path, NOTEBOOKS, load_registry())


# Bad files: the text, and how the error goes on after the file's name. RUN stands for an entry of
# notebook 01.

RUN = 'runs: [{notebook: "01", %s}]'
BAD_FILES = {
    # Not the YAML of a sweep
    "empty file": ("", "top level: expected a mapping"),
    "only a comment": ("# nothing", "top level: expected a mapping"),
    "a list at the top": ("- notebook: '01'", "top level: expected a mapping"),
    "text at the top": ("hello", "top level: expected a mapping"),
    "syntax error": (
        "name: fit\nruns: [{notebook: '01'}\ntier: core\n",
        "line 3: not valid YAML: .*; correct that line",
    ),
    "tab for indentation": ("runs:\n\t- notebook: '01'", "line 2: not valid YAML: found character"),
    "two documents": (
        "runs: []\n---\nruns: []",
        "line 2: not valid YAML: but found another document",
    ),
    "control character": ("name: fit\nruns: \x00", "line 2: not valid YAML: special characters"),
    "not UTF-8": (b"name: \xff", "not text in UTF-8"),
    "too deep": ("runs: " + "[" * 5000, "top level: nested too deeply"),
    "alias": ("runs:\n- &a {notebook: '01'}\n- *a", "line 3: not valid YAML: an alias"),
    "merge key": (
        "<<: {name: fit}\nruns: []",
        'top level: YAML reads the key << as merge; quote it: "<<"',
    ),
    "Python tag": (
        "runs: !!python/object/apply:os.getcwd []",
        "runs: the tag .*python/object.* is not accepted",
    ),
    "tag that does not fit": (
        RUN % "set: {train: !!bool 1}",
        r"runs\[0\].set.train: the tag .*bool is not accepted",
    ),
    "tag of nothing": ("runs: !!int", "runs: the tag .*int is not accepted"),
    "set": ("runs: !!set {a}", "runs: the tag .* is not accepted"),
    # Keys
    "key twice": (
        "name: a\nruns: []\nname: b",
        "top level: the key name stands again in line 3; remove",
    ),
    "key twice further down": (
        RUN % "grid: {count: [1], count: [2]}",
        r"runs\[0\].grid: the key count stands again",
    ),
    "key that is no text": (
        RUN % "set: {on: 1}",
        r'runs\[0\].set: YAML reads the key on as bool; quote it: "on"',
    ),
    "key that is a list": ("{[a]: 1}", "top level: the key in line 1 is a list or mapping"),
    "unknown key": (
        "run: [{notebook: '01'}]",
        "run: unknown key; did you mean runs.* name, runs, tier, hardware",
    ),
    "unknown key of a run": (
        RUN % "gird: {count: [1]}",
        r"runs\[0\].gird: unknown key; did you mean grid.* notebook, ",
    ),
    "unknown key like no other": (
        RUN % "xyz: 1",
        r"runs\[0\].xyz: unknown key; the keys here are notebook, grid, zip, ",
    ),
    "key of the code": (
        RUN % "zipped: {count: [1]}",
        r"runs\[0\].zipped: unknown key; did you mean zip",
    ),
    # name, runs, filters
    "no runs": ("name: fit", "runs: is missing"),
    "empty runs": ("runs: []", "runs: .* expected at least one element"),
    "runs left open": ("runs:", "runs: YAML reads nothing as null; write a value"),
    "runs as a mapping": ("runs: {notebook: '01'}", "runs: .* expected a list"),
    "run as text": ("runs: ['01']", r"runs\[0\]: '01' .* expected a mapping such as"),
    "name with a space": (
        "name: my sweep\nruns: [{notebook: '01'}]",
        "name: 'my sweep' .*expected only a-z",
    ),
    "name that climbs": (
        "name: ../x\nruns: [{notebook: '01'}]",
        "name: '../x' .*expected only a-z",
    ),
    "name as a number": ("name: 12\nruns: [{notebook: '01'}]", "name: 12 .*expected text"),
    "name as a bool": (
        "name: no\nruns: [{notebook: '01'}]",
        'name: YAML reads no as the bool False.*quote it.*"no"',
    ),
    "unknown tier": (
        "tier: hard\nruns: [{notebook: '01'}]",
        "tier: 'hard' .*expected core or extra",
    ),
    "empty hardware": (
        "hardware: ''\nruns: [{notebook: '01'}]",
        "hardware: '' .*expected some text",
    ),
    "tier leaves nothing": (
        "tier: extra\nruns: [{notebook: '01'}]",
        "tier extra: no notebook of the runs is left",
    ),
    "filters leave nothing": (
        "tier: core\nhardware: H100\nruns: [{notebook: '01'}]",
        "tier core and hardware H100: no notebook of the runs is left",
    ),
    # The notebook
    "no notebook": ("runs: [{set: {count: 1}}]", r"runs\[0\].notebook: is missing"),
    "unknown number": (
        "runs: [{notebook: '17'}]",
        r"runs\[0\].notebook: no notebook '17' .* has 01, 02, 03",
    ),
    "unknown file": (
        "runs: [{notebook: 01_frist.ipynb}]",
        r"runs\[0\].notebook: .*did you mean 01_first.ipynb",
    ),
    "number without quotes": (
        "runs: [{notebook: 01}]",
        r'runs\[0\].notebook: YAML reads 01 as the int 1; .*quote it.*"01"',
    ),
    "notebook as a list": ("runs: [{notebook: ['01']}]", r"runs\[0\].notebook: .*expected text"),
    "notebook as a bool": ("runs: [{notebook: true}]", r"runs\[0\].notebook: True .*expected text"),
    "notebook without parameters": (
        "runs: [{notebook: '03'}]",
        "03_without.ipynb needs exactly one code cell",
    ),
    # Sections of a run
    "timeout of zero": (
        RUN % "timeout_seconds: 0",
        r"runs\[0\].timeout_seconds: 0 .*expected a positive number",
    ),
    "timeout as text": (
        RUN % "timeout_seconds: 2m",
        r"runs\[0\].timeout_seconds: '2m' .*expected a positive number",
    ),
    "timeout as a bool": (
        RUN % "timeout_seconds: true",
        r"runs\[0\].timeout_seconds: True .*expected a positive number",
    ),
    "timeout in minutes": (
        RUN % "timeout_seconds: 1:30",
        r"timeout_seconds: YAML reads 1:30 as the int 90; write 90",
    ),
    "timeout without end": (
        RUN % "timeout_seconds: .inf",
        r"timeout_seconds: YAML reads .inf as inf; write a finite",
    ),
    "empty grid": (RUN % "grid: {}", r"runs\[0\].grid: .*at least one element"),
    "empty grid list": (RUN % "grid: {count: []}", r"runs\[0\].grid.count: .*at least one element"),
    "grid as a list": (RUN % "grid: [1, 2]", r"runs\[0\].grid: .*expected a mapping of names"),
    "single grid value": (
        RUN % "grid: {card: T4}",
        r"runs\[0\].grid.card: 'T4' .*expected a list such as",
    ),
    "unequal zip": (
        RUN % "zip: {card: [a, b], count: [1]}",
        r"runs\[0\].zip: card has 2, count has 1; expected as many",
    ),
    "empty list": (RUN % "list: []", r"runs\[0\].list: .*at least one element"),
    "empty row of a list": (RUN % "list: [{}]", r"runs\[0\].list\[0\]: .*at least one element"),
    "list of values": (RUN % "list: [1, 2]", r"runs\[0\].list\[0\]: 1 .*expected a mapping"),
    "set as a list": (RUN % "set: [count]", r"runs\[0\].set: .*expected a mapping"),
    "name in grid and set": (
        RUN % "grid: {count: [1]}, set: {count: 2}",
        r"runs\[0\].grid.count: .*in set too; remove",
    ),
    "name in grid and list": (
        RUN % "grid: {count: [1]}, list: [{count: 2}]",
        r"runs\[0\].list.count: .*in grid too",
    ),
    "name in grid and zip": (
        RUN % "grid: {count: [1]}, zip: {count: [2]}",
        r"runs\[0\].zip.count: .*in grid too",
    ),
    # Values
    "unknown parameter": (
        RUN % "grid: {crad: [L4]}",
        r"runs\[0\].grid.crad\[0\]: 01_first.* no parameter crad; .* card\?",
    ),
    "later value of a grid": (
        RUN % "grid: {count: [1, 2.5]}",
        r"runs\[0\].grid.count\[1\]: 2.5 is a float; expected an int",
    ),
    "value of a zip": (
        RUN % "zip: {count: [true]}",
        r"runs\[0\].zip.count\[0\]: True is a bool; expected an int",
    ),
    "value of a list": (
        RUN % "list: [{count: 1}, {train: 1}]",
        r"runs\[0\].list\[1\].train: 1 is an int; expected a bool",
    ),
    "value of a set": (
        RUN % "set: {train: 'true'}",
        r"runs\[0\].set.train: 'true' is a str; .*without quotes",
    ),
    "number for text": (
        RUN % "grid: {card: [4090]}",
        r'grid.card\[0\]: 4090 is an int; .*quote it if text is meant: "4090"',
    ),
    "bool for text": (
        RUN % "set: {card: true}",
        r'set.card: True is a bool; .*quote it if text is meant: "true"',
    ),
    "list without its own brackets": (
        RUN % "grid: {limits_gib: [12, 20]}",
        r"limits_gib\[0\]: 12 .*a list of its own",
    ),
    "mapping as a value": (
        RUN % "set: {count: {a: 1}}",
        r"set.count: .* is a dict; expected an int",
    ),
    "no for text": (
        RUN % "set: {card: no}",
        r'set.card: YAML reads no as the bool False; .*quote it if text is meant: "no"',
    ),
    "on for a bool": (
        RUN % "set: {train: on}",
        r"set.train: YAML reads on as the bool True; write true, or quote it",
    ),
    "1e5 for a float": (
        RUN % "set: {share: 1e5}",
        r"set.share: '1e5' is a str; .*YAML reads .*1e5, as text; write it out",
    ),
    "octal number": (
        RUN % "set: {count: 012}",
        r'set.count: YAML reads 012 as the int 10; write 10, or quote it.*"012"',
    ),
    "hexadecimal number": (
        RUN % "set: {count: 0x1F}",
        r"set.count: YAML reads 0x1F as the int 31; write 31",
    ),
    "underscores": (
        RUN % "set: {count: 1_000}",
        r"set.count: YAML reads 1_000 as the int 1000; write 1000",
    ),
    "date": (
        RUN % "set: {card: 2024-01-01}",
        r"set.card: YAML reads 2024-01-01 as timestamp; quote it",
    ),
    "impossible date": (
        RUN % "set: {card: 2024-13-41}",
        r"set.card: YAML reads 2024-13-41 as timestamp; quote it",
    ),
    "null": (RUN % "set: {card: ~}", r"set.card: YAML reads ~ as null; .*quote it"),
    "not a number": (
        RUN % "set: {share: .nan}",
        r"set.share: YAML reads .nan as nan; write a finite number",
    ),
    "beyond the largest float": (
        RUN % "set: {share: 1.0e+999}",
        r"set.share: YAML reads 1.0e\+999 as inf",
    ),
    "five thousand digits": (
        RUN % ("set: {count: %s}" % ("9" * 5000)),
        "set.count: YAML takes '9999.* for a number.*too long",
    ),
    "unread parameter": (
        RUN % "set: {unread: 2}",
        r"runs\[0\].set.unread: .* of 01_first.ipynb .*nothing reads it",
    ),
    "replaced parameter": (
        RUN % "set: {replaced: 2}",
        r"runs\[0\].set.replaced: .*code cell 2 gives the name another",
    ),
    # The runs together
    "value twice": (
        RUN % "grid: {count: [1, 1]}",
        r"runs\[0\] \(its run 2\) repeats runs\[0\] \(its run 1\): .*count=1",
    ),
    "float twice": (
        RUN % "grid: {share: [1, 1.0]}",
        r"runs\[0\] \(its run 2\) repeats runs\[0\] \(its run 1\)",
    ),
    "run twice": (
        (
            "runs: [{notebook: '01', set: {count: 3}}, {notebook: '02'}, {notebook: '01', grid:"
            " {count: [4, 3]}}]"
        ),
        (
            r"runs\[2\] \(its run 2\) repeats runs\[0\] \(its run 1\): 01_first.ipynb with count=3;"
            r" remove one"
        ),
    ),
    "defaults twice": (
        "runs: [{notebook: '01', set: {count: 2}}, {notebook: '01'}]",
        r"runs\[1\] .* repeats runs\[0\] .*: 01_first.ipynb with the defaults",
    ),
    "too many runs": (
        RUN % f"grid: {{count: {list(range(1001))}, share: {list(range(10))}}}",
        "runs: 10,010 runs are planned; expected at most 10,000",
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_file_and_entry(read, tmp_path, text, says):
    with pytest.raises(SweepError, match=says) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'fit.yaml'}: ")
    assert "\n" not in message


def test_too_many_runs_are_refused_without_being_expanded(read):
    # A billion runs: had they been expanded, memory would have run out.
    values = {
        "count": list(range(1000)),
        "share": list(range(1000)),
        "card": [f"c{n}" for n in range(1000)],
    }
    with pytest.raises(SweepError, match="runs: 1,000,000,000 runs are planned"):
        read(RUN % f"grid: {yaml.safe_dump(values, default_flow_style=True, width=10**9).strip()}")


def test_a_file_name_that_cannot_be_a_sweeps_name_is_refused(read):
    with pytest.raises(SweepError, match="name: 'My Sweep' .the file's name where none is given"):
        read("runs: [{notebook: '01'}]", "My Sweep.yaml")


def test_a_file_that_does_not_exist_is_refused_by_name(suite, tmp_path):
    with pytest.raises(SweepError, match="none.yaml: cannot be read .No such file"):
        read_sweep_file(tmp_path / "none.yaml", *suite)


def test_a_folder_is_refused_by_name(suite, tmp_path):
    with pytest.raises(SweepError, match="cannot be read .Is a directory"):
        read_sweep_file(tmp_path, *suite)


def test_a_notebook_that_is_registered_but_absent_is_named(suite, tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text('runs: [{notebook: "01"}]')
    with pytest.raises(SweepError, match="fit.yaml: .*01_first.ipynb cannot be read"):
        read_sweep_file(path, tmp_path, suite[1])
