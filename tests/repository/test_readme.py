"""The commands and the code of the README and of docs/ do what these say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from glm4v_nb.cli import main
from glm4v_nb.inference import load
from glm4v_nb.serving.command import running, welcome
from glm4v_nb.serving.options import Options

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = [
    *(ROOT / name for name in READMES),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
BLOCKS = [
    (name, language, block)
    for name, text in TEXTS.items()
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
]
# In the order they stand in, each once.
COMMANDS = list(
    dict.fromkeys(
        line
        for _, _, block in BLOCKS
        for line in block.splitlines()
        if line.startswith((".venv/bin/glm4v-nb ", ".venv/bin/simgpu "))
    )
)
# By code, so that what two documents share runs once.
PYTHON = {block: name for name, language, block in reversed(BLOCKS) if language == "python"}
PYTHON = [(name, block) for block, name in reversed(PYTHON.items())]
QUANTISES = r"weights[= ]\"?(int8|int4|nf4)"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def skip_without_libraries(text: str):
    """Of quantised weights, where this is not an environment of the lock."""
    if re.search(QUANTISES, text):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def run(words: list[str]) -> subprocess.CompletedProcess:
    """Run a command of the README with this environment's programs; it has to end with 0."""
    program = Path(sys.executable).with_name(Path(words[0]).name)
    done = subprocess.run(
        [program, *words[1:]],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def told(capfd, monkeypatch):
    """Runs a command of glm4v-nb in this process, which has loaded torch already; what it prints.
    It has to end with 0."""
    monkeypatch.chdir(ROOT)

    def call(words: list[str]) -> str:
        assert Path(words[0]).name == "glm4v-nb"
        code = main(words[1:])
        printed = capfd.readouterr()
        assert code == 0, printed.out + printed.err
        return printed.out

    return call


@pytest.mark.parametrize(
    ("name", "questions"), [("README.md", "Questions"), (READMES[1], "常见问题")]
)
def test_a_readme_is_one_page_and_success_comes_before_what_takes_minutes(name, questions):
    text = TEXTS[name]
    assert len(text.encode()) <= 9000
    assert text.index("glm4v-nb fit --card L4 --count 2") < text.index("make run")
    pictures = re.findall(r"^!\[[^]]*\]\((?!http)", text, flags=re.MULTILINE)
    assert len(pictures) == 2, "memory and speed, besides badges"
    questions = text.partition(f"\n## {questions}\n")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\*\*[^*]+[?？]\*\*", questions, flags=re.MULTILINE)) == 5


def test_the_chinese_readme_has_the_commands_and_the_code_of_the_english_one():
    english, chinese = (
        [block for name, _, block in BLOCKS if name == readme] for readme in READMES
    )
    without_comments = [
        [re.sub(r"^(make .*?) *#.*", r"\1", block, flags=re.MULTILINE) for block in blocks]
        for blocks in (english, chinese)
    ]
    assert without_comments[0] == without_comments[1]
    for one, other in (READMES, READMES[::-1]):
        assert f"]({other})" in TEXTS[one]


def test_every_command_of_the_documents_is_tested_here():
    assert {shlex.split(command)[1] for command in COMMANDS} == {
        "fit",
        "doctor",
        "run",
        "sweep",
        "report",
        "serve",
        "verify",
    }


FITS = [command for command in COMMANDS if " fit " in command or "/simgpu run " in command]


@pytest.mark.parametrize("command", FITS)
def test_a_fit_command_of_the_documents_fits(command, told):
    skip_without_libraries(command)
    words = shlex.split(command)
    is_own_process = command == FITS[0] or Path(words[0]).name != "glm4v-nb"
    assert "fits" in (run(words).stdout if is_own_process else told(words))


CHECKS = [command for command in COMMANDS if re.search(" (doctor|verify)", command)]


@pytest.mark.parametrize("command", CHECKS)
def test_what_the_documents_let_check_has_nothing_to_mend(command, told):
    assert told(shlex.split(command))


def test_the_experiments_of_the_documents_run_and_report(tmp_path, told):
    found = [shlex.split(command) for command in COMMANDS if command not in FITS]
    runs, sweeps, reports = (
        [words for words in found if words[1] == name] for name in ("run", "sweep", "report")
    )
    assert runs and sweeps and reports
    for words in runs:
        told([*words, "--output", str(tmp_path)])
    for words in reports:  # of what the first command ran
        (folder,) = tmp_path.iterdir()
        run([*words[:2], str(folder), *words[3:]])
        assert (folder / "report.html").is_file()
    # The runs of a sweep take minutes, and to predict all of them one. Without the runs, two
    # commands may be the same.
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    for file in (tmp_path / "sweeps").glob("*.toml"):
        file.write_text(re.sub(r"(?m)^(grid.*= \[[^,]+),.*]", r"\1]", file.read_text()))
    for words in {tuple(word for word in words if word != "--dry-run") for words in sweeps}:
        assert "1 run" in told([*words[:2], str(tmp_path / words[2]), *words[3:], "--dry-run"])


def test_the_dask_commands_of_the_documents_have_options_and_settings_that_dask_knows():
    import dask.config
    import distributed  # noqa: F401

    lines = [
        line
        for name, _, block in BLOCKS
        for line in block.splitlines()
        if ".venv/bin/dask " in line and name == "docs/cluster.md"
    ]
    parts = [line.partition("/dask ")[2].split()[0] for line in lines]
    assert parts == ["scheduler", "worker", "worker", "scheduler", "worker"]
    known = {part: run(["dask", part, "--help"]).stdout for part in set(parts)}
    for part, line in zip(parts, lines, strict=True):
        options = set(re.findall(r"--[a-z-]+", known[part]))
        assert set(re.findall(r" (--[a-z-]+)", line)) <= options, line
    for name in re.findall(r"DASK_(?!CONFIG\b)(\w+)", TEXTS["docs/cluster.md"]):
        assert dask.config.get(name.lower().replace("__", "."), "unknown") != "unknown", name


HERE = "http://127.0.0.1:8000/v1"  # where the service listens that docs/serving.md starts


@pytest.fixture(scope="module")
def served():
    """That service in this process: it, its options, its address."""
    (command,) = [shlex.split(each) for each in COMMANDS if shlex.split(each)[1] == "serve"]
    options = Options(command[2], port=0)
    with running(options, *load(ROOT / command[2])) as (service, address):
        yield service, options, address


def test_the_curl_line_of_the_service_s_page_is_the_one_it_prints_and_gets_an_answer(served):
    service, options, address = served
    (line,) = re.findall(r"^curl .*$", TEXTS["docs/serving.md"], flags=re.MULTILINE)
    assert line in welcome(service, options, HERE).splitlines()
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    words = shlex.split(line.replace(HERE, address))
    done = subprocess.run([*words, "--silent"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("name", "code"), PYTHON, ids=[f"{name}-{number}" for number, (name, _) in enumerate(PYTHON)]
)
def test_the_python_of_the_documents_prints_what_they_say(name, code, capsys, request):
    skip_without_libraries(code)
    if "OpenAI(" in code:
        code = code.replace(HERE, request.getfixturevalue("served")[2])
    if name == "README.md":
        lines = run(["python", "-c", code]).stdout.splitlines()
    else:  # here torch is loaded already
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        lines = capsys.readouterr().out.splitlines()
    if "stream(" in code:
        assert lines == ["4"], "the crosses"
    elif "OpenAI(" in code:
        assert lines == ["2"], "objects"
    elif "memory_allocated(index)" in code or "card.allocated_bytes" in code:
        if "rig.provenance" in code:
            assert "simulated" in lines.pop(0) or "NVIDIA" in lines[0]
            sizes = [int(line.split()[0]) for line in lines]
        else:
            assert all(line.startswith("NVIDIA L4 ") for line in lines)
            sizes = [int(line.split()[-1]) for line in lines]
        # Both cards' weights: 27.8 GB and the rounding of about a thousand tensors to 512 bytes.
        assert len(sizes) == 2
        assert sum(sizes) == pytest.approx(27_812_641_792, abs=512 * 1100)
    else:
        assert lines, "it shows something"


def test_the_python_of_the_readme_and_of_the_guide_is_there_to_be_tested():
    assert [name for name, _ in PYTHON if name in ("README.md", "docs/using.md")] == [
        "README.md",
        "docs/using.md",
        "docs/using.md",
        "docs/using.md",
    ]


def test_the_accuracy_that_the_guide_tells_is_the_stored_one():
    report = json.loads((ROOT / "benchmarks" / "results" / "miniature_evaluation.json").read_text())
    (told,) = re.findall(r"([\d.]+) % exactly", " ".join(TEXTS["docs/using.md"].split()))
    assert float(told) == pytest.approx(100 * report["accuracy"], abs=0.0051)


@pytest.mark.parametrize("name", TEXTS)
def test_every_make_target_of_a_document_exists(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`|&& )make (\w+)", TEXTS[name], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("name", TEXTS)
def test_no_link_of_a_document_leads_nowhere(name):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXTS[name]):
        file, _, heading = link.partition("#")
        if file.startswith("../../actions/"):  # of the page that shows the repository
            continue
        target = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            ], link


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_that_a_document_names_exists(name):
    folders = "benchmarks|docs|glm4v_nb|nbsweep|notebooks|simgpu|sweeps|tests|tools"
    for path in re.findall(rf"`(?:python )?((?:{folders})/[\w./*-]+)", TEXTS[name]):
        assert list(ROOT.glob(path.rstrip("."))), path


def test_the_readme_links_every_lesson_and_every_document_is_linked():
    registry = tomllib.loads((ROOT / "notebooks" / "registry.toml").read_text(encoding="utf-8"))
    links = {
        ((ROOT / name).parent / link.partition("#")[0]).resolve()
        for name, text in TEXTS.items()
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", text)
    }
    for entry in registry["notebook"]:
        for name in READMES:
            assert f"](notebooks/{entry['file']})" in TEXTS[name], (name, entry["file"])
    for path in (*sorted((ROOT / "docs").glob("*.*")), ROOT / "CITATION.cff"):
        assert path in links, path


def test_the_readme_says_what_each_lesson_takes_as_the_registry_does():
    registry = tomllib.loads((ROOT / "notebooks" / "registry.toml").read_text(encoding="utf-8"))
    for entry in registry["notebook"]:
        link = f"(notebooks/{entry['file']})"
        (row,) = [line for line in TEXTS["README.md"].splitlines() if link in line]
        minutes = f"{max(1, round(entry['minutes']))} + {entry['reading_minutes']}"
        assert row.endswith(f"| {minutes} |"), row


MEASURED = [
    (name, section.partition("\n")[0])
    for name in ("README.md", "docs/accuracy.md", "docs/using.md", "simgpu/README.md")
    for section in re.split(r"(?m)^#+ ", TEXTS[name])
    if re.search(r"\b[Mm]easured\b", section)
]


@pytest.mark.parametrize(("name", "title"), MEASURED)
def test_a_section_with_measured_figures_says_of_which_weights(name, title):
    """Random ones, but for the miniature, which is trained."""
    section = next(each for each in re.split(r"(?m)^#+ ", TEXTS[name]) if each.startswith(title))
    words = " ".join(section.split())
    assert re.search(r"[Rr]andom weights|weights were random|\btrained\b", words), title


def test_every_test_that_holds_a_promise_of_security_is_there():
    named = set(re.findall(r"`(test_\w+)`", TEXTS["docs/security.md"]))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"^def (test_\w+)\(", text, re.M)}
    assert len(named) > 15
    assert named - there == set()
