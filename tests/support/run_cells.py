"""Cells of the small notebooks that tests of sweeps run: how a run keeps a record, and the ways it
can end."""

KEEP = """
def keep(name, value):
    record = {"name": name, "value": value, "unit": "", "label": "arithmetic"}
    with open(os.environ["NBSWEEP_RECORDS"], "a") as file:
        file.write(json.dumps(record) + "\\n")
"""
# By the parameter ``mode``; the cells before have imported what this needs.
ENDINGS = """
if mode == "oom":
    raise type("OutOfMemoryError", (RuntimeError,), {})(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 22.03 GiB "
        "of which 1.00 GiB is free. Including non-PyTorch memory, this process has 21.03 GiB "
        "memory in use. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 0 bytes is "
        "reserved by PyTorch but unallocated."
    )
if mode == "failed":
    raise ValueError(f"number {number} at {object()} of '{number}'")
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "hung":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    time.sleep(300)
"""
