"""Builds `.venv` from requirements.lock, or finds in milliseconds that the one present is still
right.

Called by every target of the Makefile. Standard library only, and only syntax that Python 2.7 and
3.6 can parse, so that an old Python ends in one clear line instead of a SyntaxError.

A stamp inside `.venv`, written last, holds hashes of what it was built from. No stamp: the
environment is half-built and is built again. Another requirements.lock, place or (chosen) Python:
built again. Another pyproject.toml alone: only the project itself is installed again.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

MINIMUM = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11")
STAMP = "glm4v-nb-environment.json"
LOG = "setup.log"
TARGET = os.environ.get("MAKE_TARGET", "run")

NETWORK_SIGNS = re.compile(
    r"Retrying \(|ConnectionError|NewConnection|timed out|name resolution|ProxyError", re.I
)
PIP_PROBLEMS = (
    re.compile(r"No matching distribution found for (?P<package>\S+)"),
    re.compile(r"Could not find a version that satisfies the requirement (?P<package>\S+)"),
    re.compile(r"Failed (?:building wheel|to build) (?:for )?(?P<package>\S+)"),
    re.compile(r"Cannot install (?P<package>\S+)"),
    re.compile(r"Collecting (?P<package>\S+)"),
)


class SetupError(Exception):
    """What was wrong, what was expected and what to do, in one line."""


def check_version(version, interpreter, target=TARGET):
    """Raise SetupError when `version`, a tuple such as sys.version_info, is below MINIMUM."""
    if tuple(version[:2]) < MINIMUM:
        raise SetupError(
            "{} is Python {}.{}; Python {}.{} or newer is needed. "
            "Install one and name it: make {} PYTHON=python3.12".format(
                interpreter, version[0], version[1], MINIMUM[0], MINIMUM[1], target
            )
        )


def check_venv_module(interpreter, has_module=None):
    """Raise SetupError when the running Python cannot create environments (Debian splits that
    off)."""
    if has_module is None:
        import importlib.util

        has_module = importlib.util.find_spec
    missing = [name for name in ("venv", "ensurepip") if not has_module(name)]
    if missing:
        raise SetupError(
            "{} lacks the module {}, which creates .venv. On Debian or Ubuntu: apt install"
            " python3-venv (or python{}.{}-venv); elsewhere install a complete Python and run make"
            " again".format(
                interpreter, " and ".join(missing), sys.version_info[0], sys.version_info[1]
            )
        )


def newer_python(candidates=NEWER_PYTHONS, find=None):
    """The path of the first candidate on PATH that starts and is new enough, or None.

    It is started, because a version manager's shim stands on PATH for versions that are switched
    off.
    """
    # Python 2 has no shutil.which, and then there is only the advice to name another Python.
    find = find or getattr(shutil, "which", lambda name: None)
    for name in candidates:
        path = find(name)
        if path is None:
            continue
        check = "import sys; sys.exit(sys.version_info < {!r})".format(MINIMUM)
        with open(os.devnull, "w") as nowhere:
            if subprocess.call([path, "-c", check], stdout=nowhere, stderr=nowhere) == 0:
                return path
    return None


def fingerprint(root):
    """What an environment depends on: contents, not times, of the two files, and the place it
    stands in."""

    def digest(name):
        with open(os.path.join(root, name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    return {"lock": digest("requirements.lock"), "project": digest("pyproject.toml"), "root": root}


def read_stamp(environment):
    """The stamp of a finished environment, or {} when it is absent or unreadable or the Python is
    gone."""
    if not os.path.exists(os.path.join(environment, "bin", "python")):
        return {}
    try:
        with open(os.path.join(environment, STAMP)) as file:
            stamp = json.load(file)
    except (IOError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def needed_work(stamp, wanted, chosen_python=None):
    """Returns "nothing", "project" (install it again) or "all" (build from scratch).

    `chosen_python` is "3.12" when the user named an interpreter of that version, else None: an
    environment built with another good Python is kept.
    """
    if any(stamp.get(key) != wanted[key] for key in ("lock", "root")):
        return "all"
    if chosen_python is not None and stamp.get("python") != chosen_python:
        return "all"
    return "nothing" if stamp.get("project") == wanted["project"] else "project"


def write_stamp(environment, wanted, python):
    """Declare the environment finished, built by `python` ("3.12"); atomic, so a stamp is whole or
    absent."""
    path = os.path.join(environment, STAMP)
    stamp = dict(wanted, python=python)
    with open(path + ".new", "w") as file:
        json.dump(stamp, file, indent=1)
    os.rename(path + ".new", path)


def explain_pip_failure(output, log, target=TARGET):
    """One line from pip's output (a list of lines): which package, why, what to do."""
    text = "\n".join(output)
    found = [match for match in (list(pattern.finditer(text)) for pattern in PIP_PROBLEMS) if match]
    package = found[0][-1].group("package") if found else "the packages"
    errors = [line.strip() for line in output if line.lstrip().lower().startswith("error:")]
    reason = errors[-1].split(":", 1)[1].strip() if errors else "see the log"
    if "No space left" in text:
        advice = (
            "Free some disk space (10 GB with the CUDA libraries) and run make {} again".format(
                target
            )
        )
    elif NETWORK_SIGNS.search(text):
        advice = "The network or the package index did not answer: check it and run make {} again".format(
            target
        )
    else:
        advice = (
            "Check the network and that this Python is supported, then run make {} again".format(
                target
            )
        )
    return "pip could not install {} ({}). {}; downloads are kept. Log: {}".format(
        package.rstrip(",:"), reason, advice, log
    )


def run_or_explain(command, advice):
    """Run a command in silence; if it fails, raise SetupError with the end of what it said and the
    advice."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    output = process.communicate()[0]
    if process.returncode != 0:
        raise SetupError(
            "{} failed: {}. {}".format(
                " ".join(command[:3]), " ".join(output.split())[-300:], advice
            )
        )


def pip_install(environment, arguments, total=None):
    """Run pip inside `environment`, show how far it is, log its output; SetupError if it fails."""
    log = os.path.join(environment, LOG)
    options = "-m pip install --no-input --disable-pip-version-check --progress-bar off"
    command = [os.path.join(environment, "bin", "python")] + options.split() + arguments
    on_terminal = sys.stdout.isatty()
    output, collected = [], 0
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
        )
        for line in process.stdout:
            file.write(line)
            output.append(line.rstrip("\n"))
            collected += line.startswith("Collecting ")
            large = re.match(
                r"\s*(Downloading|Using cached) (\S+?)-\d\S* \((\d{3,}\.?\d* MB|\S+ GB)\)", line
            )
            if on_terminal and total and line.startswith(("Collecting ", "Installing ")):
                what = line.split()[1] if line.startswith("Collecting ") else "installing them all"
                sys.stdout.write(
                    "\r\033[K  {} of about {} packages: {}".format(collected, total, what[:60])
                )
            elif large:
                sys.stdout.write(
                    "{}  {} {} ({})\n".format("\r\033[K" if on_terminal else "", *large.groups())
                )
            elif (
                total and not on_terminal and line.startswith("Collecting ") and collected % 40 == 0
            ):
                sys.stdout.write("  {} of about {} packages\n".format(collected, total))
            sys.stdout.flush()
    if on_terminal and total:
        sys.stdout.write("\r\033[K")
    if process.wait() != 0:
        raise SetupError(explain_pip_failure(output, os.path.relpath(log)))


def create(root, environment):
    """Build the environment from nothing with the running Python, up to but without the stamp."""
    if os.path.isdir(environment) and os.listdir(environment):
        if not os.path.exists(os.path.join(environment, "pyvenv.cfg")):
            raise SetupError(
                ".venv is there but no virtual environment; it is left alone. Move it away and run"
                " make again"
            )
    with open(os.path.join(root, "requirements.lock")) as file:
        total = sum(1 for line in file if "==" in line)
    print(
        "Building .venv with Python {}.{} from requirements.lock. Once only; 2 to 15 minutes, "
        "mostly torch.".format(*sys.version_info[:2])
    )
    sys.stdout.flush()
    run_or_explain(
        [sys.executable, "-m", "venv", "--clear", environment],
        "Install a complete Python (Debian: apt install python3-venv) and run make again",
    )
    pip_install(environment, ["-r", os.path.join(root, "requirements.lock")], total)


def install_project(root, environment):
    """Install the project itself, editable, and the Jupyter kernel `python3` of this
    environment."""
    pip_install(environment, ["--no-deps", "--no-build-isolation", "--editable", root])
    kernel = "-m ipykernel install --sys-prefix --name python3 --display-name".split()
    run_or_explain(
        [os.path.join(environment, "bin", "python")] + kernel + ["Python 3 (glm4v-nb)"],
        "Run make clean, then make {}".format(TARGET),
    )


def set_up(root, environment, chosen):
    """Leave a finished environment behind, doing only what is needed.

    chosen: whether the user named this Python; then it is used or refused, never replaced.
    Raises SetupError.
    """
    running_python = "{}.{}".format(*sys.version_info[:2])
    chosen_python = running_python if chosen else None
    wanted = fingerprint(root)
    if needed_work(read_stamp(environment), wanted, chosen_python) == "nothing":
        return
    if sys.version_info[:2] < MINIMUM and not chosen:
        path = newer_python()
        if path is not None:
            os.execv(path, [path, os.path.abspath(__file__)])
    check_version(sys.version_info, sys.executable)
    check_venv_module(sys.executable)

    import fcntl

    # Two makes at once: the second waits, then finds the work done. The lock ends with the process.
    with open(os.path.join(root, "requirements.lock")) as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        stamp = read_stamp(environment)
        work = needed_work(stamp, wanted, chosen_python)
        if work == "nothing":
            return
        python = running_python if work == "all" else stamp.get("python")
        if work == "all":
            if stamp:
                os.remove(os.path.join(environment, STAMP))
            create(root, environment)
        # The packages are in. Should the next step fail, only that step is left to do.
        write_stamp(environment, dict(wanted, project=None), python)
        install_project(root, environment)
        write_stamp(environment, wanted, python)
    print(".venv is ready.")


def main():
    """Exit code 0: .venv is finished. 1: it is not, and one line said why. 130: interrupted."""
    parser = argparse.ArgumentParser(description="Build or check .venv")
    parser.add_argument("--chosen", action="store_true", help="the user named this Python")
    arguments = parser.parse_args()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        set_up(root, os.path.join(root, ".venv"), arguments.chosen)
    except SetupError as error:
        sys.stderr.write("error: {}\n".format(error))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: .venv is unfinished; run make {} again\n".format(TARGET))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
