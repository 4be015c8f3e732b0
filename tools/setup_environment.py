"""Builds `.venv` from requirements.lock, or finds in milliseconds that it is still right.

Every target of the Makefile calls it. Standard library only, and syntax that Python 2.7 can parse,
so that an old Python ends in one clear line. A stamp in `.venv`, written last, says what it was
built from. Without one, or with another lock, place or chosen Python, all is built again; with
another pyproject.toml, the project alone is installed again.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys

MINIMUM = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAKE = "run make " + os.environ.get("MAKE_TARGET", "run")
STAMP = "glm4v-nb-environment.json"


def check_version(version, interpreter):
    """Exit, in one line, when `version`, a tuple such as sys.version_info, is below MINIMUM."""
    if tuple(version[:2]) < MINIMUM:
        text = "error: {} is Python {}.{}; Python {}.{} or newer is needed. Install one, then {}"
        words = (interpreter,) + tuple(version[:2]) + MINIMUM + (MAKE + " PYTHON=python3.12",)
        sys.exit(text.format(*words))


def fingerprint(root, chosen_python=None):
    """Contents, not times, of two files, the place, and the Python ("3.12") if one was named."""
    found = {"root": root, "python": chosen_python} if chosen_python else {"root": root}
    for key, name in (("lock", "requirements.lock"), ("project", "pyproject.toml")):
        with open(os.path.join(root, name), "rb") as file:
            found[key] = hashlib.sha256(file.read()).hexdigest()
    return found


def read_stamp(environment):
    """The stamp of a finished environment; {} if it is absent or not whole, or has no Python."""
    try:
        os.stat(os.path.join(environment, "bin", "python"))
        with open(os.path.join(environment, STAMP)) as file:
            return json.load(file)
    except (OSError, IOError, ValueError):
        return {}


def needed_work(environment, wanted):
    """What is left to do for an environment of this fingerprint: "nothing", "project" or "all"."""
    stamp = read_stamp(environment)
    other = {name for name in wanted if stamp.get(name) != wanted[name]}
    return "all" if other - {"project"} else "project" if other else "nothing"


def pip_install(environment, *arguments):
    """Run that environment's pip, a line for each package; exit in one line if it fails."""
    command = [os.path.join(environment, "bin", "python"), "-m", "pip", "install", "--no-input"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "universal_newlines": True}
    process, output = subprocess.Popen(command + list(arguments), **pipe), ""
    for line in process.stdout:
        output += line
        if line.startswith(("Collecting", "Installing")):
            print("  " + line.strip()[:90])
    with open(os.path.join(environment, "setup.log"), "w") as log:
        log.write(output)
    if process.wait() != 0:
        sys.exit(explain_failure(output))


def explain_failure(output):
    """One line from what pip said: its last error, and what to do about it."""
    errors = [line for line in output.splitlines() if line.lower().startswith("error:")]
    reason = "everything ({})".format(errors[-1][7:300]) if errors else "everything"
    advice = "Check the network or the package index, and that this Python is supported"
    if "No space left" in output:
        advice = "Free some disk space (10 GB with the CUDA libraries)"
    text = "error: pip could not install {}. {}, then {} again; downloads are kept. Log: {}"
    return text.format(reason, advice, MAKE, ".venv/setup.log")


def create(root, environment):
    """Make the environment from nothing, with every package of the lock; exit if that fails."""
    files = os.listdir(environment) if os.path.isdir(environment) else []
    if files and "pyvenv.cfg" not in files:
        sys.exit("error: .venv is no environment and left alone. Move it away, then " + MAKE)
    if STAMP in files:  # before anything else goes
        os.remove(os.path.join(environment, STAMP))
    print("Building .venv from requirements.lock. Once only; 2 to 15 minutes, mostly torch.")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", environment]) != 0:
        sys.exit("error: this Python makes no environments, see above. Mend it, then " + MAKE)
    pip_install(environment, "-r", os.path.join(root, "requirements.lock"))


def set_up(root, environment, chosen):
    """Leave a finished environment behind; `chosen`: the user named this Python."""
    python = "{}.{}".format(*sys.version_info[:2])
    wanted = fingerprint(root, python if chosen else None)
    work = needed_work(environment, wanted)
    if work == "nothing":
        return
    if work == "all":
        check_version(sys.version_info, sys.executable)
        create(root, environment)
    pip_install(environment, "--no-deps", "--no-build-isolation", "--editable", root)
    python = python if work == "all" else read_stamp(environment)["python"]
    with open(os.path.join(environment, STAMP), "w") as file:
        json.dump(dict(wanted, python=python), file)
    print(".venv is ready.")


if __name__ == "__main__":
    try:
        # Two makes at once: the second waits here, then finds the work done.
        with open(os.path.join(ROOT, "requirements.lock")) as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            set_up(ROOT, os.path.join(ROOT, ".venv"), "--chosen" in sys.argv)
    except KeyboardInterrupt:
        sys.exit("interrupted: .venv is unfinished; {} again".format(MAKE))
