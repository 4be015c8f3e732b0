"""The doctor: what it finds on this machine, and on machines it is told about."""

import json
import types
from importlib import metadata
from pathlib import Path

import pynvml
import pytest
import torch

import glm4v_nb.cli
from glm4v_nb import doctor

GIB = 2**30


def found(check) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in check()}


@pytest.fixture
def driver(monkeypatch):
    """A driver with two L4; another process uses the second."""
    process = types.SimpleNamespace(pid=2**22 + 1, usedGpuMemory=GIB)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13020,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA L4",
        "nvmlDeviceGetMemoryInfo": lambda handle, version=None: types.SimpleNamespace(
            used=handle * GIB, total=22 * GIB
        ),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [process] * handle,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_every_check_of_this_machine_ends_with_a_finding():
    findings = list(doctor.examine())
    subjects = [finding.subject for finding in findings]
    assert {
        "Python",
        "libraries",
        "NVIDIA driver",
        "torch build",
        "simulated cards",
        "host memory",
        "disk",
    } < set(subjects)
    assert not [finding for finding in findings if "check failed" in finding.found]
    assert next(one for one in findings if one.subject == "simulated cards").status == "ok"


def test_a_check_that_breaks_is_a_finding_and_the_others_still_run(monkeypatch):
    def _disk():
        raise PermissionError(f"no access to {Path.home()}/secret")

    monkeypatch.setattr(doctor, "_disk", _disk)
    findings = {finding.subject: finding for finding in doctor.examine()}
    assert findings["disk"].status == "stop" and "PermissionError" in findings["disk"].found
    assert str(Path.home()) not in findings["disk"].found
    assert "notebook kernel" in findings


def test_the_verdict_is_the_worst_status():
    def findings(*statuses):
        return [doctor.Finding("x", status, "y") for status in statuses]

    assert doctor.verdict(findings("ok", "look", "ok")) == "look"
    assert doctor.verdict(findings("stop", "look")) == "stop"
    assert doctor.verdict(findings("ok")) == "ok"


def test_the_driver_is_named_and_a_shared_card_pointed_out(driver):
    findings = found(doctor._driver)
    assert findings["NVIDIA driver"].found == "580.65.06, up to CUDA 13.2"
    assert findings["users of GPU 0"].status == "ok"
    assert findings["users of GPU 1"].status == "look"
    assert "1.00 of 22.00 GiB used, 1 other processes" in findings["users of GPU 1"].found


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: torch sees a GPU here")
@pytest.mark.parametrize(
    ("cuda", "visible", "advice"),
    [
        (None, None, "Install a build for your driver"),
        ("13.0", "", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "The driver is older"),
    ],
)
def test_gpus_that_torch_does_not_see_are_a_stop_with_the_likely_reason(
    driver, monkeypatch, cuda, visible, advice
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = doctor._torch_build()
    assert finding.status == "stop" and "none of the driver's 2 GPUs" in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize("version", ["5.16.9", "6.0.0", None])
def test_a_library_outside_its_range_or_missing_is_a_stop(monkeypatch, version):
    real = metadata.version

    def pretended(name):
        if name != "transformers":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)
    finding = found(doctor._libraries)["libraries"]
    assert (
        finding.status == "stop"
        and f"transformers {version or 'missing'}, expected" in finding.found
    )


def test_an_installed_torchvision_is_pointed_out(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.28.0" if name == "torchvision" else real(name)
    )
    assert found(doctor._libraries)["torchvision"].status == "look"


def test_a_gpu_that_multiplies_wrongly_is_a_stop(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7 + index, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(doctor, "_multiply", lambda device: None)
    findings = found(doctor._gpus)
    assert (findings["GPU 0"].status, findings["GPU 1"].status) == ("look", "ok")

    def wrong(device):
        raise ValueError("a matrix product came out wrong")

    monkeypatch.setattr(doctor, "_multiply", wrong)
    assert all(finding.status == "stop" for finding in doctor._gpus())


def test_the_product_that_is_checked_is_right_on_a_sound_device():
    # Small: in float16 a processor takes seconds for what a GPU is given.
    doctor._multiply(torch.device("cpu"), side=128)


def test_little_host_memory_is_worth_a_look(monkeypatch):
    memory = types.SimpleNamespace(available=8 * GIB, total=16 * GIB)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    (finding,) = doctor._host_memory()
    assert (finding.status, finding.found) == ("look", "8.0 of 16.0 GiB free")


def test_the_report_names_neither_home_nor_user_nor_host(monkeypatch):
    monkeypatch.setattr(doctor.platform, "node", lambda: "badger")
    text = f"{Path.home()}/x on badger by {Path.home().name}; badgers stay"
    block = doctor.report([doctor.Finding("disk", "ok", text)])
    assert block.splitlines()[1] == "ok   disk: ~/x on HOST by USER; badgers stay"


def test_the_command_prints_json_and_its_exit_code_is_the_verdict(monkeypatch, capsys):
    for status, code in (("ok", 0), ("look", 0), ("stop", 1)):
        monkeypatch.setattr(
            doctor, "examine", lambda status=status: [doctor.Finding("disk", status, "5 GB")]
        )
        assert glm4v_nb.cli.main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out) == {
            "status": status,
            "findings": [{"subject": "disk", "status": status, "found": "5 GB", "advice": ""}],
        }


def test_the_command_prints_a_table_or_a_block_to_paste(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "examine", lambda: [doctor.Finding("disk", "look", "5 GB [free]", "clear it")]
    )
    assert glm4v_nb.cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert "5 GB [free]" in table and "clear it" in table and "Next:" in table
    assert glm4v_nb.cli.main(["doctor", "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "look disk: 5 GB [free]"


def test_a_package_that_is_not_installed_has_no_list_of_libraries(monkeypatch):
    def requires(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    (finding,) = doctor._libraries()
    assert finding.status == "look"
    assert "without being installed" in finding.found
    assert "make setup" in finding.advice


def refuse(code):
    def query(*arguments, **options):
        raise pynvml.NVMLError(code)

    return query


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "sudo modprobe nvidia"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "Run nvidia-smi"),
        (pynvml.NVML_ERROR_UNKNOWN, "Run nvidia-smi"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "Run nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_work_is_a_stop_with_the_way_out(monkeypatch, code, advice):
    monkeypatch.setattr(pynvml, "nvmlInit", refuse(code))
    (finding,) = doctor._driver()
    assert finding.status == "stop" and "does not work" in finding.found
    assert advice in finding.advice


def test_no_driver_at_all_is_fine(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", refuse(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    (finding,) = doctor._driver()
    assert finding.status == "ok" and finding.found.startswith("none (")


REFUSALS = (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED)
QUERIES = {
    "nvmlSystemGetDriverVersion": ("NVIDIA driver", "version unknown, up to CUDA 13.2"),
    "nvmlSystemGetCudaDriverVersion": ("NVIDIA driver", "580.65.06, up to CUDA unknown"),
    "nvmlDeviceGetName": ("users of GPU 0", "name unknown: 0.00 of 22.00 GiB"),
    "nvmlDeviceGetMemoryInfo": ("users of GPU 0", "NVIDIA L4: memory unknown, 0 other processes"),
    "nvmlDeviceGetComputeRunningProcesses": ("users of GPU 0", "used, other processes unknown"),
}


@pytest.mark.parametrize("code", [*REFUSALS, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
@pytest.mark.parametrize("query", QUERIES)
def test_what_the_driver_does_not_tell_is_unknown_and_the_rest_is_told(
    driver, monkeypatch, query, code
):
    monkeypatch.setattr(pynvml, query, refuse(code))
    findings = found(doctor._driver)
    assert set(findings) == {"NVIDIA driver", "users of GPU 0", "users of GPU 1"}
    subject, expected = QUERIES[query]
    assert expected in findings[subject].found
    assert findings[subject].status == "ok" and findings[subject].advice == ""


def test_a_card_that_the_driver_does_not_open_is_worth_a_look_and_the_others_are_told(
    driver, monkeypatch
):
    def handle(index):
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    findings = found(doctor._driver)
    assert findings["users of GPU 0"].status == "look"
    assert "dmesg" in findings["users of GPU 0"].advice
    assert "1.00 of 22.00 GiB used" in findings["users of GPU 1"].found


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("", "ok", "PyTorch's defaults"),
        ("expandable_segments:True", "ok", "segments that grow"),
        (" max_split_size_mb:128 ,", "ok", "larger blocks are kept whole"),
        ("garbage_collection_threshold:0.8", "look", "unset it there"),
        ("roundup_power2_divisions:[256:1,512:2,>:8]", "look", "rounded up"),
        ("expandable_segments:yes", "stop", "expected expandable_segments:True or :False"),
        ("max_split_size_mb:many", "stop", "max_split_size_mb:N"),
        ("max_split_size_mb:10", "stop", "PyTorch takes only more than"),
        ("expandable_segment:True", "stop", "Unset it, or write expandable_segments."),
        ("nonsense", "stop", "nonsense is unknown to PyTorch"),
        ("backend:native,expand:1,expandable_segments:no", "stop", "expand is unknown"),
    ],
)
@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_options_of_the_allocator_are_explained_and_bad_ones_named(
    monkeypatch, variable, text, status, words
):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, text)
    (finding,) = doctor._allocator()
    assert finding.status == status
    assert words in f"{finding.found} {finding.advice}"
    assert text in finding.found
    # Whatever the variable says, that simulated cards work is found out without it.
    (simulation,) = doctor._simulation()
    assert simulation.status == "ok"
