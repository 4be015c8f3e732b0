"""JupyterLab with notebook 09 in a headless Chromium; without a Chromium these tests are not run,
and say so."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = "09_prompt_the_model.ipynb"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing but the page under test: Chromium would look for updates and its maker's services.
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


# The brackets before every code cell: [ ] not run, [*] running, [3] done.
PROMPTS = (
    "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt =>"
    " prompt.textContent)"
)
# Whether JupyterLab has started the kernel of the open notebook and is connected to it.
READY = """() => {
    const session = window.jupyterapp?.shell.currentWidget?.sessionContext;
    const kernel = session?.isReady && session.session?.kernel;
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""


def find_chromium() -> str | None:
    """GLM4V_NB_CHROMIUM, or the first of the usual names on PATH."""
    named = os.environ.get("GLM4V_NB_CHROMIUM")
    return named or next(filter(None, map(shutil.which, CHROMIUMS)), None)


def pytest_collection_modifyitems(items):
    if find_chromium() is None:
        reason = (
            f"not run: none of {', '.join(CHROMIUMS)} is on PATH; install Chromium (Debian: apt-get"
            " install chromium) or name one in GLM4V_NB_CHROMIUM"
        )
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def lab_options() -> tuple[dict[str, str], list[str]]:
    """What `make lab` sets so that a photograph can be uploaded: environment and arguments."""
    shown = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True)
    words = shlex.split(shown.stdout.replace("\\\n", " "))
    pairs = [word.split("=", 1) for word in words if word.startswith("GLM4V_NB_")]
    return dict(pairs), [word for word in words if word.startswith("--ServerApp.tornado")]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """JupyterLab on a copy of notebook 09: (address, runtime directory)."""
    root, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # what the page shows was then made in this session
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, root / NOTEBOOK)
    # JupyterLab takes cells that are out of sight off the page; here all of them are looked at.
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables, options = lab_options()
    environment = {
        **os.environ,
        **variables,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "HF_HUB_OFFLINE": "1",
    }
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--ServerApp.port={port}",
             "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0",
             f"--ServerApp.root_dir={root}", "--allow-root",
             "--IdentityProvider.token=", "--LabApp.news_url=None",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
             "--LabApp.expose_app_in_browser=True", "--ServerApp.disable_check_xsrf=True",
             *options],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address + "/api", process, home / "server.log")
        yield address, home / "runtime"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(address: str, process: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start; its log ends:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. Playwright runs an event loop until it ends, and other tests of the
    process begin one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which containers have only, Chromium runs without its sandbox or not at all.
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=QUIET, chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, server):
    """Notebook 09 open in JupyterLab with every cell executed."""
    address, _ = server
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(30_000)
    page.goto(f"{address}/lab/tree/{NOTEBOOK}?reset")
    # A command given before the kernel is connected opens a dialog that asks for one.
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    # The last cell prints what was found.
    page.wait_for_function(
        f"() => ({PROMPTS}).every(prompt => /\\[\\d+\\]/.test(prompt))", timeout=240_000
    )
    yield page
    page.close()


@pytest.fixture(scope="module")
def kernel(page, server):
    """Runs code in the notebook's own kernel: ``kernel("x = 1")``."""
    _, runtime = server
    (connection,) = runtime.glob("kernel-*.json")
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def execute(code: str):
        reply = client.execute_interactive(code, timeout=60, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]

    yield execute
    client.stop_channels()
