"""The report of a sweep as a reader meets it: opened from the disk, in a browser."""

import os
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nbsweep.report import write_comparison, write_report
from nbsweep.store import Outcome, OutOfMemoryCause, Record, RunSpec, Sweep

GIB = 2**30
SCREENSHOTS = os.environ.get("GLM4V_NB_SCREENSHOTS")
ATTACK = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
CARDS = {"L4": 22, "T4": 15}


def write_grid(
    directory: Path, cards=CARDS, batches=(1, 2, 4, 8), tokens=(512, 1024, 2048), attack=""
) -> Path:
    """A sweep over cards, batches and tokens, where what does not fit a card runs out of memory;
    then its report.

    ``attack`` adds a run whose every text it is.
    """
    directory.mkdir()
    specs = []

    def add(
        outcome: Outcome, *records: Record, notebook="03_memory.ipynb", title="Memory", **parameters
    ):
        spec = RunSpec(
            id=f"{len(specs):04x}{'0' * 12}", notebook=notebook, title=title, parameters=parameters,
            given=list(parameters), source="c0ffee", package="facade", version="0.1.0",
            checkpoint="",
            timeout_seconds=60,
        )  # fmt: skip
        specs.append(spec)
        folder = directory / spec.id
        folder.mkdir()
        (folder / "outcome.json").write_text(outcome.model_dump_json())
        (folder / "records.jsonl").write_text(
            "".join(one.model_dump_json() + "\n" for one in records)
        )

    common = {
        "started": "2026-10-18T19:02:11+02:00",
        "platform": "Linux",
        "versions": {"torch": "2.13.0"},
    }
    for card, size in cards.items():
        for batch in batches:
            for count in tokens:
                need = 13 * GIB + batch * count * 500_000
                short = need - size * GIB
                parameters = {"card": card, "batch": batch, "tokens": count}
                if short > 0:
                    cause = OutOfMemoryCause(
                        device=0, phase="prefill", short_bytes=short, needs_bytes=need
                    )
                    error = f"OutOfMemoryError: tried to allocate {short} bytes"
                    trace = "Traceback\n" + "  a line of a traceback, as long as they are\n" * 30
                    more = {
                        "error": error,
                        "signature": "OutOfMemoryError",
                        "traceback": trace,
                        "oom": cause,
                    }
                    add(Outcome(status="oom", seconds=1.0, **common, **more), **parameters)
                else:
                    peak = Record(name="peak", value=need, unit="bytes", label="simulated")
                    rate = Record(
                        name="speed", value=100 / batch, unit="tokens/s", label="measured on L4"
                    )
                    done = Outcome(status="done", seconds=batch * count / 1000, **common)
                    add(done, peak, rate, **parameters)
    if attack:
        texts = dict.fromkeys(("error", "signature", "traceback", "platform"), attack)
        failed = Outcome(
            **{**common, **texts, "versions": {attack: attack}}, status="failed", seconds=1.0
        )
        figure = Record(name=attack, value=1.5, unit=attack, label=attack)
        add(
            failed,
            figure,
            notebook=attack,
            title=attack,
            card=attack,
            batch=1,
            tokens=512,
            **{attack: attack},
        )
    sweep = Sweep(name=attack or "grid", created="2026-10-18T19:00:00+02:00", runs=specs)
    (directory / "sweep.json").write_text(sweep.model_dump_json())
    return write_report(directory)


@pytest.fixture
def open_page(browser):
    """Opens a file; fails the test if the page says anything on the console or asks for anything
    but itself."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    said, asked, opened = [], [], []

    def open_page(path: Path):
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        opened.append(path.as_uri())
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert said == []
    assert asked == opened


@pytest.fixture
def page(open_page, tmp_path):
    """The report of a grid of 24 runs."""
    return open_page(write_grid(tmp_path / "grid"))


def screenshot(page, name: str):
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/sweep_{name}.png", full_page=True)


def head(page, name: str):
    return page.get_by_role("columnheader", name=re.compile(rf"^{name}\b"))


def choose(page, name: str, choice: str):
    page.locator("#scalars").get_by_role("combobox", name=name).select_option(label=choice)


def column(page, name: str) -> list[str]:
    """The cells below a heading, of the rows that are shown, from top to bottom."""
    heads = page.locator("#table thead th").all_inner_texts()
    number = next(index for index, text in enumerate(heads) if text.split()[0] == name)
    return page.evaluate(
        "number => [...document.querySelectorAll('#table tbody:not([hidden])')].map(body => "
        "body.rows[0].cells[number].textContent.trim())",
        number,
    )


def test_a_heading_sorts_up_then_down_as_numbers_with_what_is_missing_last(page):
    peak = head(page, "peak")
    peak.get_by_role("button").click()
    assert peak.get_attribute("aria-sort") == "ascending"
    found = column(page, "peak")
    numbers = [float(text) for text in found if text != "–"]
    assert numbers == sorted(numbers) and 0 < len(numbers) < 24
    assert found[len(numbers) :] == ["–"] * (24 - len(numbers))
    peak.get_by_role("button").press("Enter")
    assert peak.get_attribute("aria-sort") == "descending"
    assert column(page, "peak") == found[: len(numbers)][::-1] + ["–"] * (24 - len(numbers))
    head(page, "tokens").get_by_role("button").press("Space")
    assert peak.get_attribute("aria-sort") == "none"
    assert column(page, "tokens") == ["512"] * 8 + ["1024"] * 8 + ["2048"] * 8


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("", 24),
        ("T4", 12),
        ("card=T4 batch=8", 3),
        ("tokens>600 tokens<2000", 8),
        ('"CARD=l4"', 12),
        ("peak<0", 0),
    ],
)
def test_the_filter_takes_words_and_conditions_on_columns(page, words, count):
    page.get_by_label("Filter").fill(words)
    assert len(column(page, "run")) == count
    expect(page.locator("#shown")).to_have_text(f"{count} of 24 shown")
    assert page.locator("#frontier a").count() == count


def test_statuses_filter_alone_and_together_and_clear_shows_all(page):
    done = page.get_by_role("button", name=re.compile("done"))
    done.click()
    assert done.get_attribute("aria-pressed") == "true"
    assert set(column(page, "status")) == {"✓ done"}
    page.get_by_role("button", name=re.compile("oom")).click()
    assert len(column(page, "status")) == 24
    page.get_by_label("Filter").fill("nothing like it")
    page.get_by_role("button", name="Clear").click()
    assert len(column(page, "status")) == 24 and done.get_attribute("aria-pressed") == "false"


def test_a_group_of_failures_shows_its_runs_in_the_table(page):
    page.get_by_role("button", name="Show only these").click()
    assert set(column(page, "failure")) == {"F1"}
    expect(page.get_by_role("region", name="Runs")).to_be_in_viewport()


def test_a_scalar_is_drawn_against_a_parameter_with_axes_units_and_label(page):
    picture = page.locator("#scalars figure svg")
    screenshot(page, "grid")
    choose(page, "Up", "peak [GiB]")
    choose(page, "Across", "tokens")
    choose(page, "Colour", "card")
    fitting = [text for text in column(page, "peak") if text != "–"]
    assert picture.locator(".point").count() == len(fitting)
    texts = picture.locator("> text").all_text_contents()
    assert {
        "peak [GiB]",
        "tokens",
        "512",
        "1024",
        "2048",
        f"simulated · {len(fitting)} runs",
    } <= set(texts)
    assert picture.locator("polyline").count() > 0
    expect(page.locator("#scalars .legend li")).to_have_text(["card = L4", "card = T4"])
    # More tokens take more memory: each point of a line is right of and above the one before.
    for points in picture.locator("polyline").evaluate_all(
        "lines => lines.map(line => line.getAttribute('points'))"
    ):
        x, y = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
        assert list(x) == sorted(x) and list(y) == sorted(y, reverse=True)
    choose(page, "Up", "speed [tokens/s]")
    expect(picture).to_contain_text(f"measured on L4 · {len(fitting)} runs")


def test_a_parameter_that_is_no_number_has_a_place_for_each_value(page):
    choose(page, "Across", "card")
    picture = page.locator("#scalars figure svg")
    expect(picture).to_contain_text("L4")
    expect(picture).to_contain_text("T4")
    assert picture.locator("polyline").count() == 0
    assert page.get_by_label("logarithmic across").is_disabled()


def test_the_frontier_shows_what_fits_for_each_card_and_what_the_others_need(page):
    figures = page.locator("#frontier figure")
    expect(figures.locator("figcaption")).to_have_text(["card = L4", "card = T4"])
    for card, figure in zip(CARDS, figures.all(), strict=True):
        rows = list(zip(column(page, "card"), column(page, "status"), strict=True))
        assert figure.locator(".fits").count() == rows.count((card, "✓ done"))
        assert figure.locator(".short").count() == rows.count((card, "✗ oom"))
    # 13 GiB and 500 kB a token of 4 × 2048, 8 × 1024 and 8 × 2048; not what the failed request was
    # short of, which says nothing about the run.
    needs = figures.last.locator("a:has(.short) text").all_text_contents()
    assert sorted(needs) == ["≥16.8", "≥16.8", "≥20.6"]
    expect(page.locator("#frontier .legend")).to_contain_text("≥ for at least")
    # The 15 GiB of a T4 hold 4,294 tokens.
    said = figures.last.get_by_role("img").get_attribute("aria-label")
    assert "tokens 512: fits up to 8; tokens 1024: fits up to 4; tokens 2048: fits up to 2." in said
    title = figures.last.locator("a:has(.short) title").last.text_content()
    assert re.search(
        r"card = T4, batch = \d, tokens = \d+: oom. GPU 0, prefill: needs at least [\d.]+ GiB,"
        r" [\d.]+ [GM]iB short",
        title,
    )
    expect(page.locator("#frontier .provenance")).to_contain_text("simulated (")


def test_words_stand_beside_the_numbers_of_the_frontier(page):
    assert page.locator("#frontier-x option").all_text_contents() == ["batch", "tokens"]
    page.locator("#frontier-y").select_option(label="card")
    figures = page.locator("#frontier figure")
    expect(figures.locator("figcaption")).to_have_text(
        [f"tokens = {count}" for count in (512, 1024, 2048)]
    )
    said = figures.last.get_by_role("img").get_attribute("aria-label")
    assert "card L4: fits up to 8; card T4: fits up to 2." in said
    # Between cards there is no edge; each row that has both has one.
    assert figures.last.locator(".edge").count() == 1


def test_a_point_leads_to_its_run(page):
    page.locator("#frontier a:has(.short)").first.click()
    target = page.locator("tbody:target")
    expect(target.locator(".more")).to_be_visible()
    expect(target.locator("th")).to_be_in_viewport()
    expect(target.locator(".more")).to_contain_text("GPU 0, prefill")
    screenshot(page, "run")


def test_a_link_to_a_run_that_the_filter_hides_shows_it(page):
    page.get_by_label("Filter").fill("status=done")
    page.locator(".error summary").first.click()
    page.locator(".error details a").last.click()
    target = page.locator("tbody:target")
    expect(target.locator("th")).to_be_in_viewport()
    expect(target.locator(".more")).to_be_visible()
    assert page.get_by_label("Filter").input_value() == ""


def test_the_keyboard_alone_opens_a_run_and_its_traceback(page):
    summary = page.locator("#table tbody:has(.oom) th summary").first
    summary.focus()
    page.keyboard.press("Enter")
    more = page.locator("tr.more:visible")
    expect(more).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(more.locator("pre")).to_be_visible()


def test_markup_from_a_notebook_does_nothing_and_is_shown_as_text(open_page, tmp_path):
    page = open_page(write_grid(tmp_path / "grid", attack=ATTACK))
    assert page.title().startswith(ATTACK)
    for select in ("#x", "#y", "#colour"):
        for option in page.locator(f"{select} option").all():
            page.locator(select).select_option(option.get_attribute("value"))
    for button in page.locator("#table thead button").all():
        button.click()
    page.get_by_label("Filter").fill("attacked")
    assert len(column(page, "run")) == 1
    page.locator("#table tbody:not([hidden]) th summary").click()
    page.locator("tr.more:visible details summary").click()
    expect(page.locator("tr.more:visible pre")).to_have_text(ATTACK)
    screenshot(page, "attack")
    assert page.evaluate("window.attacked") is None
    assert page.locator("img, script").count() == 2  # the page's own data and script


def test_the_policy_of_the_page_stops_a_script_that_is_not_its_own(browser, tmp_path):
    path = write_grid(tmp_path / "grid")
    path.write_text(
        path.read_text().replace("</main>", "<script>window.attacked = 1</script></main>")
    )
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.locator("#shown").inner_text() == "24 of 24 shown"
    assert page.evaluate("window.attacked") is None
    page.close()


def test_the_table_is_there_without_javascript(browser, tmp_path):
    path = write_grid(tmp_path / "grid")
    page = browser.new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    expect(page.locator("#table tbody")).to_have_count(24)
    expect(page.get_by_label("Filter")).to_be_hidden()
    page.locator("#table th summary").first.click()  # unfolds without a script
    expect(page.locator("tr.more").first).to_be_visible()
    page.close()


def test_a_sweep_of_one_run_and_one_of_none_open_without_an_error(open_page, tmp_path):
    page = open_page(write_grid(tmp_path / "one", {"L4": 22}, [1], [512]))
    assert page.locator("#scalars .point").count() == 1
    page = open_page(write_grid(tmp_path / "none", {}))
    assert page.locator("h1").inner_text() == "0 of 0 runs done"


def test_a_comparison_sorts_and_filters(open_page, tmp_path):
    first = write_grid(tmp_path / "one").parent
    second = write_grid(tmp_path / "two", {"L4": 20, "T4": 15}).parent
    page = open_page(write_comparison(first, second, tmp_path / "comparison.html"))
    screenshot(page, "comparison")
    changed = len(column(page, "what"))
    assert changed > 0
    head(page, "batch").get_by_role("button").click()
    assert column(page, "batch") == sorted(column(page, "batch"))
    page.get_by_label("Filter").fill("what=status card=T4")
    expect(page.locator("#shown")).to_have_text(f"0 of {changed} shown")


def test_a_thousand_runs_open_and_sort_in_less_than_three_seconds(open_page, tmp_path):
    cards = {
        f"card {number}": size
        for number, size in enumerate((15, 22, 24, 32, 40, 48, 64, 80, 96, 141))
    }
    path = write_grid(tmp_path / "grid", cards, range(1, 11), range(512, 5632, 512))
    took = []
    while (
        len(took) < 5 and min(took, default=9) >= 3
    ):  # something else may have had the machine for a moment
        start = time.monotonic()
        page = open_page(path)
        head(page, "seconds").get_by_role("button").click()
        page.wait_for_function(
            "document.querySelector('[aria-sort=ascending]') && document.body.offsetHeight"
        )
        took.append(time.monotonic() - start)
    found = [float(text) for text in column(page, "seconds")]
    assert len(found) == 1000 and found == sorted(found)
    print(f"1,000 runs: {path.stat().st_size / 1e6:.1f} MB, open and sorted in {min(took):.2f} s")
    assert min(took) < 3
