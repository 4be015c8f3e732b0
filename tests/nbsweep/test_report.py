"""The report of a sweep, its tables, and the comparison of two sweeps."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from nbsweep.compare import Change, compare
from nbsweep.report import write_comparison, write_report
from nbsweep.store import Outcome, OutOfMemoryCause, Record, RunSpec, Sweep, read_sweep
from nbsweep.tables import runs_table

GIB = 2**30


def spec_of(
    identity: str, notebook="03_memory.ipynb", given=None, title="Memory", **parameters
) -> RunSpec:
    return RunSpec(
        id=identity, notebook=notebook, title=title, parameters={**parameters, "seed": 7},
        given=list(parameters) if given is None else given, source="c0ffee", package="facade" * 4,
        version="0.1.0", checkpoint="decade", timeout_seconds=60,
    )  # fmt: skip


def ended(status="done", **more) -> Outcome:
    common = {
        "started": "2026-10-18T19:02:11+02:00",
        "seconds": 2.5,
        "platform": "Linux 6.8 x86_64",
    }
    common |= {
        "versions": {"torch": "2.13.0"},
        "cards": ["NVIDIA L4, driver 570.1"],
        "commit": "feed123-dirty",
    }
    return Outcome(status=status, **common | more)


def oom(device=0, phase="prefill", short=3 * GIB // 2, needs=None) -> Outcome:
    cause = OutOfMemoryCause(device=device, phase=phase, short_bytes=short, needs_bytes=needs)
    return ended(
        "oom", error="OutOfMemoryError: no room", signature="OutOfMemoryError: no room", oom=cause
    )


def peak(value, label="simulated", unit="bytes") -> Record:
    return Record(name="peak", value=value, unit=unit, label=label)


@pytest.fixture
def write(tmp_path):
    """Writes a sweep's folder: ``write((spec, outcome, record, ...), ..., name="fit")``."""

    def write(*runs, name="fit") -> Path:
        directory = tmp_path / name
        for spec, outcome, *records in runs:
            folder = directory / spec.id
            folder.mkdir(parents=True)
            if outcome:
                (folder / "outcome.json").write_text(outcome.model_dump_json())
            lines = "".join(record.model_dump_json() + "\n" for record in records)
            (folder / "records.jsonl").write_text(lines)
        directory.mkdir(exist_ok=True)
        sweep = Sweep(name=name, created="2026-10-18T19:00:00+02:00", runs=[run[0] for run in runs])
        (directory / "sweep.json").write_text(sweep.model_dump_json())
        return directory

    return write


@pytest.fixture
def page(write):
    """The page of a sweep: the arguments of ``write``."""
    return lambda *runs: parsed(write_report(write(*runs)))


def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def data_of(soup: BeautifulSoup) -> dict:
    return json.loads(soup.find(id="data").string)


def words(element) -> str:
    return " ".join(element.get_text(" ").split())


def csv_rows(directory: Path) -> list[dict]:
    with open(directory / "runs.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_status_is_counted_and_a_run_that_has_not_ended_is_unfinished(page):
    statuses = ("done", "done", "oom", "failed", "timeout", "killed", "not run")
    runs = [
        (spec_of(f"r{index}", batch=index), ended(status)) for index, status in enumerate(statuses)
    ]
    soup = page(*runs, (spec_of("r8", batch=8), None))
    assert words(soup.h1) == "2 of 8 runs done"
    counted = [words(button) for button in soup.select("[data-status]")]
    assert counted == [
        "2 done",
        "1 oom",
        "1 failed",
        "1 timeout",
        "1 killed",
        "1 not run",
        "1 unfinished",
    ]


def test_the_head_says_when_and_with_which_package_versions_and_platform(page):
    said = words(page((spec_of("a", batch=1), ended())).find("h1").find_next("p"))
    for fact in (
        "2026-10-18 19:00:00+02:00",
        "0.1.0 (facadefacade)",
        "torch 2.13.0",
        "Linux 6.8 x86_64",
    ):
        assert fact in said


def test_versions_that_differ_between_runs_are_counted(page):
    other = ended(versions={"torch": "2.14.0"}, cards=None, commit="")
    soup = page((spec_of("a", batch=1), ended()), (spec_of("b", batch=2), other))
    assert "2.13.0 in 1 run 2.14.0 in 1 run" in words(soup)
    assert "commit feed123-dirty in 1 run unknown in 1 run" in words(soup)
    assert "GPUs NVIDIA L4, driver 570.1 in 1 run unknown in 1 run" in words(soup)
    assert "GPUs none" in words(page((spec_of("c", batch=1), ended(cards=[]))))


def test_the_table_stands_in_the_html_with_given_parameters_scalars_units_and_labels(page):
    runs = [
        (spec_of("aaaaaaaaaaaa", batch=1, card="L4"), ended(), peak(3 * GIB // 2)),
        (spec_of("bbbbbbbbbbbb", batch=2, card="L4"), ended(), peak(3 * GIB)),
    ]
    table = page(*runs).find(id="table")
    heads = [words(head) for head in table.select("thead th")]
    assert heads == [
        "run",
        "status",
        "seconds measured, wall clock",
        "batch",
        "card",
        "peak [GiB] simulated",
    ]
    rows = [
        [words(cell) for cell in body.tr.find_all(["th", "td"])] for body in table.select("tbody")
    ]
    assert rows == [
        ["aaaaaaaa", "✓ done", "2.5", "1", "L4", "1.5"],
        ["bbbbbbbb", "✓ done", "2.5", "2", "L4", "3"],
    ]


def test_labels_that_differ_stand_at_each_figure(page):
    soup = page(
        (spec_of("a", batch=1), ended(), peak(GIB)),
        (spec_of("b", batch=1), ended(), peak(GIB, "measured on L4")),
    )
    bodies = soup.select("#table tbody")
    assert [words(body.tr.find_all("td")[-1]) for body in bodies] == [
        "1 simulated",
        "1 measured on L4",
    ]


def test_headings_are_buttons_and_say_how_they_sort(page):
    for head in page((spec_of("a", batch=1), ended())).select("#table thead th"):
        assert head["aria-sort"] == "none" and head["scope"] == "col"
        assert head.find("button")["type"] == "button"


def test_a_run_unfolds_to_its_error_traceback_parameters_and_provenance(page):
    failed = ended(
        "failed",
        error="ValueError: bad",
        failed_cell=4,
        cells=9,
        traceback="Traceback\n  line 3",
        signature="V",
    )
    more = page((spec_of("abc", batch=3), failed)).select_one("tr.more")
    assert "Cell 4 of 9: ValueError: bad" in words(more)
    assert more.pre.string == "Traceback\n  line 3"
    said = words(more)
    for fact in (
        "batch = 3",
        "seed = 7",
        "abc",
        "c0ffee",
        "facade" * 4,
        "decade",
        "03_memory.ipynb",
    ):
        assert fact in said
    for fact in ("NVIDIA L4, driver 570.1", "feed123-dirty", "torch 2.13.0", "Linux 6.8 x86_64"):
        assert fact in said


def test_an_executed_notebook_is_linked_where_it_exists(write):
    directory = write((spec_of("a", batch=1), ended()), (spec_of("b", batch=2), ended()))
    (directory / "b" / "executed.html").write_text("read me")
    links = parsed(write_report(directory)).select("#table tbody th a")
    assert [link["href"] for link in links] == ["b/executed.html"]


def test_failures_of_one_signature_are_one_group_that_says_what_its_runs_share(page):
    def failed(size):
        return ended(
            "failed", error=f"ValueError: {size} is too many", signature="ValueError: # is too many"
        )

    soup = page(
        (spec_of("a", batch=1, card="L4", dtype="float16"), ended()),
        (
            spec_of("b", batch=8, card="L4", dtype="float16"),
            ended("timeout", error="ended after 60 s"),
        ),
        (spec_of("c", batch=8, card="T4", dtype="float16"), failed(8)),
        (spec_of("d", batch=9, card="T4", dtype="float16"), failed(9)),
    )
    groups = [words(group) for group in soup.select(".error")]
    assert len(groups) == 2
    assert groups[0].startswith("F1 · 2 runs · failed · all with card = T4")
    assert "ValueError: 8 is too many" in groups[0] and "ValueError: # is too many" in groups[0]
    assert "dtype" not in groups[0]  # all runs of the sweep have it
    assert groups[1].startswith("F2 · 1 run · timeout") and "ended after 60 s" in groups[1]


@pytest.mark.parametrize(
    ("second", "parameters", "drawn"),
    [
        (oom(), {"batch": 2, "tokens": 20}, True),
        (ended(), {"batch": 2, "tokens": 20}, False),
        (oom(), {"batch": 2, "tokens": 10}, False),
        (oom(), {"batch": 2, "tokens": "20"}, True),
        (oom(), {"batch": 1, "tokens": "20"}, False),
        (oom(), {"batch": 1, "tokens": True}, False),
    ],
    ids=[
        "two numbers",
        "nothing ran out",
        "one number",
        "a number and a word",
        "a word",
        "a truth value",
    ],
)
def test_the_frontier_is_on_the_page_where_some_fit_and_a_number_and_another_parameter_vary(
    page, second, parameters, drawn
):
    soup = page((spec_of("a", batch=1, tokens=10), ended()), (spec_of("b", **parameters), second))
    assert (soup.find(id="frontier") is not None) == drawn


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (oom(), "GPU 0, prefill: 1.5 GiB short"),
        (oom(needs=24 * GIB), "GPU 0, prefill: needs at least 24 GiB, 1.5 GiB short"),
        (oom(1, "decode", 512), "GPU 1, decode: 512 bytes short"),
        (oom(0, "decode", 0), "GPU 0, decode: 0 bytes short"),
        (oom(None, None, None), "unknown device, unknown phase: unknown bytes short"),
    ],
)
def test_where_a_run_ran_out_of_memory_is_said_in_words(page, outcome, said):
    soup = page((spec_of("a", batch=1), outcome))
    assert said in words(soup.select_one("tr.more"))
    assert data_of(soup)["rows"][0]["oom"] == said


def test_what_a_run_recorded_that_it_needs_says_more_than_its_error(page):
    def needs(name, value, unit="bytes"):
        return Record(name=name, value=value, unit=unit, label="simulated")

    more = (needs("needs on card 0", 30 * GIB), needs("needs on card 1", 27 * GIB))
    no_bytes = (needs("needs on card 0", "much"), needs("needs", 10**12, "tokens"))
    runs = [
        (spec_of("a", batch=1), oom(needs=24 * GIB), *more),
        (spec_of("b", batch=2), oom(needs=24 * GIB)),
        (spec_of("c", batch=3), oom(needs=24 * GIB), needs("needs", 20 * GIB)),
        (spec_of("d", batch=4), oom(), needs("needs", 20 * GIB)),
        (spec_of("e", batch=5), ended(), needs("needs", 20 * GIB)),
        (spec_of("f", batch=6), ended(), *no_bytes),
        (spec_of("g", batch=7), oom()),
    ]
    rows = data_of(page(*runs))["rows"]
    assert [(row["needs_gib"], row["at_least"]) for row in rows] == [
        (30, False), (24, True), (24, True), (20, False), (20, False), (None, False), (None, False),
    ]  # fmt: skip
    assert [row["oom"] for row in rows[:4]] == [
        "GPU 0, prefill: needs 30 GiB, 1.5 GiB short",
        "GPU 0, prefill: needs at least 24 GiB, 1.5 GiB short",
        "GPU 0, prefill: needs at least 24 GiB, 1.5 GiB short",
        "GPU 0, prefill: needs 20 GiB, 1.5 GiB short",
    ]


ATTACKS = [
    "<script>window.attacked = 1</script>",
    "</script><script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 1'>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}<!--",
    "</pre></td></table><h1>mine</h1>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_from_notebooks_stays_text_in_the_page_and_in_its_data(page, attack):
    spec = spec_of(
        "a", notebook=attack, title=attack, card=attack, given=["card", attack], **{attack: attack}
    )
    failed = ended(
        "failed",
        error=attack,
        signature=attack,
        traceback=attack,
        platform=attack,
        versions={attack: attack},
    )
    good = (
        spec_of("b", batch=1),
        ended(),
        Record(name=attack, value=attack, unit=attack, label=attack),
    )
    soup = page((spec, failed), good)
    assert [script.get("type") for script in soup.find_all("script")] == ["application/json", None]
    assert (
        not soup.find_all("img")
        and not soup.select("[onerror], [onload]")
        and len(soup.find_all("h1")) == 1
    )
    assert soup.select_one("tr.more pre").string == attack
    row = data_of(soup)["rows"][0]["cells"]
    assert row.count(attack) == 4  # notebook, two parameters, error


def test_the_page_asks_nothing_of_any_other_place(write):
    directory = write((spec_of("a", batch=1), ended(), peak(GIB)), (spec_of("b", batch=2), oom()))
    soup = parsed(write_report(directory))
    assert not soup.select("[src], link:not([href='data:,']), iframe, object")
    assert (
        "default-src 'none'"
        in soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    )
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", str(soup))


def test_figures_that_json_has_no_word_for_do_not_break_the_page(write):
    directory = write((spec_of("a", batch=1), ended()))
    line = '{"name": "loss", "value": NaN, "unit": "", "label": "simulated"}\n'
    (directory / "a" / "records.jsonl").write_text(line)
    soup = parsed(write_report(directory))
    assert "NaN" in data_of(soup)["rows"][0]["cells"]
    assert csv_rows(directory)[0]["loss []"] == "nan"


def test_a_list_is_one_cell_of_json(write):
    directory = write((spec_of("a", sizes=[1, 2]), ended()))
    cells = [words(cell) for cell in parsed(write_report(directory)).select("#table tbody td")]
    assert "[1, 2]" in cells
    assert csv_rows(directory)[0]["param.sizes"] == "[1, 2]"


def test_a_figure_recorded_again_is_a_series_whose_last_value_is_shown_as_such(write):
    records = [Record(name="loss", value=v, unit="", label="simulated") for v in (3, 2.5, 2)]
    directory = write(
        (spec_of("a", batch=1), ended(), *records), (spec_of("b", batch=2), ended(), records[0])
    )
    data = data_of(parsed(write_report(directory)))
    (index,) = [each["index"] for each in data["columns"] if each["name"] == "loss"]
    assert [row["cells"][index] for row in data["rows"]] == [2, 3]
    labels = [row["labels"][str(index)] for row in data["rows"]]
    assert labels == ["simulated · last of 3", "simulated"]
    rows = csv_rows(directory)
    assert [row["loss []"] for row in rows] == ["2", "3"]
    assert [row["loss [] series"] for row in rows] == ["[3, 2.5, 2]", "[3]"]
    table = runs_table(read_sweep(directory)[1])
    assert list(table)[-3:] == ["loss []", "loss [] label", "loss [] series"]


def test_texts_of_megabytes_make_no_page_of_megabytes(write):
    text = "x" * 5_000_000
    failed = ended("failed", error=text, signature=text, traceback=text)
    figure = Record(name="answer", value=text, unit="", label="simulated")
    directory = write((spec_of("a", prompt=text), failed, figure), (spec_of("b", prompt=""), None))
    page = write_report(directory)
    assert page.stat().st_size < 300_000
    assert (directory / "runs.csv").stat().st_size < 3 * len(text), "whole: parameter and figure"
    said = words(parsed(page))
    assert "[shortened from 5,000,000 characters; executed.ipynb has all]" in said
    assert "[shortened from 5,000,000 characters; runs.csv has all]" in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("records.jsonl", b"\x00\xff\x80\n", "line 1 of records.jsonl is no record, but b'"),
        ("records.jsonl", b"\x89PNG", "line 1 of records.jsonl is no record"),
        ("records.jsonl", b'{"name": "a"}\n', "line 1 of records.jsonl is no record"),
        ("outcome.json", b"\xff\xfe", "outcome.json cannot be read"),
        ("outcome.json", b'{"status": "done", "started": "", "seconds": NaN}', "outcome.json"),
        ("outcome.json", b'{"status": "done", "started": "", "seconds": 1e999}', "outcome.json"),
        ("outcome.json", b'{"status": "done", "started": "", "seconds": -1}', "outcome.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_beside_the_report(write, capsys, name, content, says):
    directory = write((spec_of("abc", batch=1), ended(), peak(1)), (spec_of("b"), ended()))
    (directory / "abc" / name).write_bytes(content)
    assert words(parsed(write_report(directory)).h1) == "1 of 2 runs done"
    said = capsys.readouterr().err
    assert said.startswith("run abc: ") and says in said and "unfinished; sweep again" in said
    assert said.count("\n") == 1


def test_figures_beyond_every_float_break_nothing(write):
    directory = write((spec_of("a", batch=1), ended(), peak(10**400)))
    assert write_report(directory).is_file()
    assert csv_rows(directory)[0]["peak [bytes]"] == str(10**400)


def test_a_sweep_of_no_runs_has_a_report(write):
    directory = write()
    soup = parsed(write_report(directory))
    assert words(soup.h1) == "0 of 0 runs done" and soup.find(id="table") is None
    assert (directory / "runs.csv").is_file()


def test_a_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_the_csv_has_a_row_a_run_with_parameters_scalars_in_their_own_unit_and_labels(write):
    directory = write(
        (spec_of("a", batch=1), ended(), peak(1), peak(3 * GIB)), (spec_of("b", batch=2), oom()),
        (spec_of("c", batch=3), None),
    )  # fmt: skip
    write_report(directory)
    rows = csv_rows(directory)
    assert list(rows[0]) == [
        "id", "notebook", "status", "seconds", "oom_device", "oom_phase", "oom_short_bytes",
        "oom_needs_bytes", "error",
        "param.batch", "param.seed", "peak [bytes]", "peak [bytes] label", "peak [bytes] series",
    ]  # fmt: skip
    assert list(rows[0].values()) == [
        "a", "03_memory.ipynb", "done", "2.5", "", "", "", "", "", "1", "7", str(3 * GIB),
        "simulated · last of 2", f"[1, {3 * GIB}]",
    ]  # fmt: skip
    assert list(rows[1].values())[2:10] == [
        "oom", "2.5", "0", "prefill", str(3 * GIB // 2), "", "OutOfMemoryError: no room", "2",
    ]  # fmt: skip
    assert rows[2]["status"] == "unfinished" and rows[2]["seconds"] == ""


# Line breaks, spaces of all widths, marks that are not seen.
HIDDEN = ["\n", "\r\n", "\v", "\f", " ", "  \n", "\xa0", "\u3000", "\u2028", "\0", "\x1b", "\x85"]
HIDDEN += ["\ufeff", "\u200b", "\u202e", "\u2060", "\xad", "\ufe0f"]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"), ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"), ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"), ("-5", "-5"), ("+1.5e3", "+1.5e3"), (-5, "-5"),
        (-0.5, "-0.5"), ("a=b", "a=b"), ("-", "'-"), ("-inf", "'-inf"), ("-1_0", "'-1_0"),
        *((f"{hidden}=1+1", f"'{hidden}=1+1") for hidden in HIDDEN),
        *((f"{hidden}a", f"'{hidden}a") for hidden in "\n\r\t\0\x85"),
        *((f"{sign}1+1", f"'{sign}1+1") for sign in "＝＋－＠﹦﹢﹣﹫\u2212"),
        (" ＝1", "' ＝1"), (" a=1", " a=1"), ("", ""), (" ", " "), ("a\n=1", "a\n=1"),
    ],
)  # fmt: skip
def test_text_in_the_csv_is_no_formula_and_numbers_stay_numbers(write, value, cell):
    directory = write((spec_of("a", parameter=value), ended()))
    write_report(directory)
    assert csv_rows(directory)[0]["param.parameter"] == cell


def test_no_separator_that_a_spreadsheet_may_take_breaks_up_a_text_of_the_csv(write):
    directory = write((spec_of("a", parameter="a;=1+1"), ended(), peak(5, label="simulated\t=2")))
    write_report(directory)
    text = (directory / "runs.csv").read_text()
    assert '"a;=1+1"' in text and '"simulated\t=2"' in text and ",5," in text


def test_a_name_in_the_csv_is_no_formula(write):
    directory = write(
        (spec_of("a"), ended(), Record(name="=HYPERLINK()", value=1, unit="", label="simulated"))
    )
    write_report(directory)
    assert "'=HYPERLINK() []" in csv_rows(directory)[0]


def test_the_parquet_file_holds_the_same_table_with_one_type_a_column(write):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="not run: pyarrow missing; pip install pyarrow"
    )
    directory = write(
        (spec_of("a", batch=1, rate=1, mixed=1, fast=True, big=2**70), ended(), peak(3 * GIB)),
        (spec_of("b", batch=2, rate=0.5, mixed="two", fast=False, big=1), oom()),
    )
    write_report(directory)
    table = parquet.read_table(directory / "runs.parquet")
    assert table.column_names == list(runs_table(read_sweep(directory)[1]))
    columns = table.to_pydict()
    assert columns["param.batch"] == [1, 2] and columns["param.rate"] == [1.0, 0.5]
    assert columns["param.mixed"] == ["1", "two"] and columns["param.fast"] == [True, False]
    assert columns["param.big"] == [str(2**70), "1"]
    assert columns["peak [bytes]"] == [3 * GIB, None] and columns["oom_short_bytes"] == [
        None,
        3 * GIB // 2,
    ]


def test_without_pyarrow_the_report_says_how_to_get_it_and_leaves_no_old_table(
    write, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    directory = write((spec_of("a", batch=1), ended()))
    (directory / "runs.parquet").write_bytes(b"of another report")
    soup = parsed(write_report(directory))
    assert "pip install pyarrow" in capsys.readouterr().err and "pip install pyarrow" in words(
        soup.footer
    )
    assert not (directory / "runs.parquet").exists() and (directory / "runs.csv").exists()


def test_a_report_that_cannot_be_put_in_place_leaves_the_old_one_and_no_litter(write, monkeypatch):
    directory = write((spec_of("a", batch=1), ended()))
    write_report(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
    (directory / "a" / "outcome.json").write_text(ended("killed").model_dump_json())

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(directory)
    assert {
        file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()
    } == before


def change(kind, before=None, after=None, batch=1, **more) -> Change:
    parameters = {"batch": batch, "seed": 7}
    return Change(
        kind=kind,
        notebook="03_memory.ipynb",
        parameters=parameters,
        before=before,
        after=after,
        **more,
    )


def test_a_sweep_compared_with_itself_has_no_changes(write):
    directory = write((spec_of("a", batch=1), ended(), peak(0)), (spec_of("b", batch=2), oom()))
    assert compare(directory, directory) == []


def test_runs_are_matched_by_notebook_and_parameters_whatever_their_id_and_order(write):
    first = write(
        (spec_of("a", batch=1, card="L4"), ended()), (spec_of("b", batch=2), oom()), name="one"
    )
    second = write(
        (spec_of("c", batch=2), ended()), (spec_of("d", card="L4", batch=1), ended()), name="two"
    )
    assert compare(first, second) == [change("status", "oom", "done", batch=2)]


def test_runs_in_one_sweep_only_are_told(write):
    first = write((spec_of("a", batch=1), ended(), peak(1)), name="one")
    second = write((spec_of("b", batch=2), None), name="two")
    assert compare(first, second) == [
        change("only in first", "done"),
        change("only in second", None, "unfinished", batch=2),
    ]


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        (100, 100.9, "same"), (100, 101, "same"), (100, 101.5, 0.015), (100, 98, -0.02),
        (-100, -98, 0.02),
        (0, 0.009, "same"), (0, 0.02, None), (0, -0.02, None), (5, 0, -1.0),
        ("star", "star", "same"), ("star", "heart", None), (True, False, None), (True, 1, None),
    ],
)  # fmt: skip
def test_a_scalar_has_changed_when_it_is_off_by_more_than_the_tolerance(
    write, before, after, relative
):
    first = write((spec_of("a", batch=1), ended(), peak(before)), name="one")
    second = write((spec_of("a", batch=1), ended(), peak(after, "measured on L4")), name="two")
    changes = compare(first, second, tolerance=0.01)
    if relative == "same":
        assert changes == []
        return
    (found,) = changes
    assert (found.kind, found.name, found.unit) == ("scalar", "peak", "bytes")
    assert (found.before, found.after) == (before, after)
    assert (found.before_label, found.after_label) == ("simulated", "measured on L4")
    # The quotient of two short decimals: exact but for the last bits of a float.
    assert found.relative == (relative if relative is None else pytest.approx(relative, rel=1e-9))


def test_a_scalar_that_only_one_of_two_equally_ended_runs_has_is_a_change(write):
    first = write((spec_of("a", batch=1), ended(), peak(1)), name="one")
    second = write((spec_of("a", batch=1), ended()), name="two")
    (found,) = compare(first, second)
    assert (found.kind, found.before, found.after) == ("scalar", 1, None)
    third = write((spec_of("a", batch=1), oom()), name="three")
    assert compare(first, third) == [change("status", "done", "oom")]


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_below_zero_is_refused(write, tolerance):
    directory = write((spec_of("a", batch=1), ended()))
    with pytest.raises(ValueError, match="expected 0 or more"):
        compare(directory, directory, tolerance)


def test_the_comparison_is_a_page_with_a_row_a_change_in_readable_units(write, tmp_path):
    first = write(
        (spec_of("a", batch=1), ended(), peak(2 * GIB)), (spec_of("b", batch=2), oom()), name="one"
    )
    second = write(
        (spec_of("a", batch=1), ended(), peak(3 * GIB)),
        (spec_of("b", batch=2), ended()),
        name="two",
    )
    path = tmp_path / "comparison.html"
    assert write_comparison(first, second, path) == path
    soup = parsed(path)
    assert words(
        soup.h1
    ) == "2 differences at 2 runs" and "In both, by notebook and parameters: 2 runs." in words(soup)
    rows = [[words(cell) for cell in body.find_all("td")] for body in soup.select("#table tbody")]
    assert rows == [
        ["scalar", "1", "peak", "GiB", "2", "3", "50"],
        ["status", "2", "–", "–", "oom", "done", "–"],
    ]  # fmt: skip
    assert not soup.find(id="frontier") and not soup.find(id="scalars")


def test_a_comparison_without_changes_says_so(write, tmp_path):
    directory = write((spec_of("a", batch=1), ended()))
    soup = parsed(write_comparison(directory, directory, tmp_path / "same.html"))
    assert words(soup.h1) == "0 differences at 0 runs" and soup.find(id="table") is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_stays_text_in_a_comparison(write, tmp_path, attack):
    def run(value):
        return (
            spec_of("a", card=attack),
            ended(),
            Record(name=attack, value=value, unit=attack, label=attack),
        )

    first, second = write(run(1), name="one"), write(run(attack), name="two")
    soup = parsed(write_comparison(first, second, tmp_path / "page.html"))
    assert (
        len(soup.find_all("script")) == 2
        and not soup.find_all("img")
        and len(soup.find_all("h1")) == 1
    )
    assert data_of(soup)["rows"][0]["cells"].count(attack) == 4
