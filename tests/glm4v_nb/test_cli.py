"""The command line: exit codes, clean output, errors of one line."""

import json
import re
import subprocess
import sys
import time

import pytest

import glm4v_nb.cli
from glm4v_nb.cli import main

PLAIN = ["verdict", "devices", "oom", "seconds", "provenance"]
PLAIN += ["versions", "exact", "unmodelled", "assumed", "not_measured"]


@pytest.fixture
def command(capfd):
    """Run a command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def needs_unasked(monkeypatch):
    """What a run that does not fit would need takes two more runs, and is not looked at here."""
    nothing = property(lambda result: [0] * len(result.devices))
    monkeypatch.setattr("simgpu.fitting.FitResult.needs", nothing)


def test_what_fits_exits_with_0_and_prints_nothing_but_the_json(command):
    code, out, err = command(
        "fit", "--card", "L4", "--count", 2, "--images", 0, "--new-tokens", 1, "--json"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["verdict"], result["oom"], result["provenance"]) == ("fits", None, "simulated")
    assert [device["card"] for device in result["devices"]] == ["L4", "L4"]


def test_without_json_a_table_the_whole_message_and_the_next_command_are_shown(command):
    code, out, err = command("fit", "--card", "rtx4090", "--new-tokens", 1)
    assert (code, err) == (3, "")
    for text in ("simulated", "0 · RTX 4090", "23.52", "weights", "allocated", "reserved", "free"):
        assert text in out
    assert "It does not fit: card 0 is full, phase load. It needs 2" in out
    assert re.search(r"needs 27\.\d\d GiB, 3\.\d\d GiB short on card 0\.", out)
    assert "[simulated NVIDIA GeForce RTX 4090]" in out
    assert "See documentation for Memory Management" in out
    assert "Host memory" not in out, "loading failed"
    assert out.endswith("Next: glm4v-nb fit --card rtx4090 --count 2 --new-tokens 1\n")


def test_the_next_command_holds_the_weights_and_keeps_the_other_options(command):
    options = ("--dtype", "float32", "--device-map", "sequential", "--images", 0, "--new-tokens", 1)
    _, out, _ = command("fit", "--card", "T4", *options)
    assert out.endswith(f"Next: glm4v-nb fit --card T4 --count 4 {' '.join(map(str, options))}\n")


def test_a_training_step_that_does_not_fit_is_told_of_gradient_checkpointing(
    command, needs_unasked
):
    code, out, _ = command("fit", "--card", "L4", "--count", 3, "--train", "--text-tokens", 2000)
    assert code == 3
    assert "phase backward" in out
    assert out.endswith(
        "Next: glm4v-nb fit --card L4 --count 3 --text-tokens 2000 --train"
        " --gradient-checkpointing\n"
    )


def test_what_fits_says_so_in_a_sentence(command):
    code, out, _ = command("fit", "--card", "H100", "--images", 0, "--new-tokens", 0)
    assert code == 0
    assert "It fits: card 0 is the fullest, with 52." in out  # of the 79 GiB
    assert out.endswith("Next: notebooks/01_will_it_fit.ipynb shows where these bytes go.\n")
    assert (
        "Host memory to load (simulated): 0.00 GiB beside Python and CUDA, 0.00 GiB stays;"
        " files are" in out
    )


def test_what_fits_with_less_to_spare_than_cards_differ_in_just_fits(command):
    options = ("--dtype", "float16", "--new-tokens", 1)
    code, out, _ = command("fit", "--card", "T4", "--count", 2, *options)
    assert code == 0
    assert "It just fits: card 0 is the fullest, with 0." in out
    assert "drivers and programs make 0.25 GiB of difference on such a card." in out


def test_host_memory_is_shown_where_it_is_needed(command):
    tower_on_cpu = '{"vision_tower": "cpu", "language_model": 0, "lm_head": 0}'
    options = ("--card", "L4", "--device-map", tower_on_cpu, "--images", 0, "--new-tokens", 0)
    _, out, _ = command("fit", *options)
    assert (
        "0.00 GiB beside Python and CUDA, 0.00 GiB stays; 8.39 GiB of weights remain in their files"
        in out
    )
    _, out, _ = command("fit", *options, "--dtype", "float16")
    # The head, the embedding and two layers' projections are converted by four threads, beside the
    # tower.
    assert "8.39 to 11.12 GiB beside Python and CUDA, 8.39 GiB stays; files are read" in out


def test_a_device_map_is_taken_as_json_or_from_a_file(command, tmp_path):
    device_map = json.dumps({"vision_tower": 1, "language_model": 0, "lm_head": 0})
    path = tmp_path / "map.json"
    path.write_text(device_map)
    answers = []
    for given in (device_map, path):
        options = ("--device-map", given, "--images", 0, "--new-tokens", 1, "--json")
        code, out, _ = command("fit", "--card", "L4", "--count", 2, *options)
        assert code == 0
        answers.append(json.loads(out)["devices"])
    assert answers[0] == answers[1]
    assert answers[0][1]["weights_bytes"] == pytest.approx(
        9.0e9, rel=0.01
    )  # the tower, 4.5e9 parameters


def test_a_device_map_that_cuts_a_block_fails_with_torchs_error_and_exit_code_1(command):
    tower = [
        f"vision_tower.{name}" for name in ("patch_embedding", "conv", "linear_proj", "boundary")
    ]
    layers = [f"vision_tower.layers.{index}" for index in range(63) if index != 3]
    parts = [f"vision_tower.layers.3.{name}" for name in ("attention", "input_layernorm", "mlp")]
    device_map = dict.fromkeys([*tower, *layers, *parts, "language_model", "lm_head"], 0)
    # The residual connection then adds a tensor of card 1 to one of card 0.
    device_map = json.dumps(device_map | {"vision_tower.layers.3.post_attention_layernorm": 1})
    code, out, err = command(
        "fit", "--card", "A100-40", "--count", 2, "--device-map", device_map, "--json"
    )
    assert (code, out) == (1, "")
    assert "Expected all tensors to be on the same device" in err
    assert err.count("\n") == 1


def test_the_allocators_configuration_decides_where_fragmentation_does(command, needs_unasked):
    options = ("--card", "L4", "--count", 2, "--batch-size", 18, "--new-tokens", 0)
    code, out, _ = command("fit", *options, "--json")
    assert code == 3
    assert "2.93 GiB is reserved by PyTorch but unallocated" in out
    assert command("fit", *options, "--alloc-conf", "expandable_segments:True")[0] == 0
    code, _, err = command("fit", *options, "--alloc-conf", "expandable")
    assert code == 2
    assert "is not simulated; expected expandable_segments:True" in err


def test_limits_add_their_keys_to_those_of_a_plain_answer(command):
    code, out, err = command(
        "fit", "--card", "H100", "--images", 0, "--new-tokens", 1, "--limits", "--json"
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert list(answer) == [
        *PLAIN,
        "host",
        "headroom_bytes",
        "largest_batch",
        "longest_context",
        "recommendation",
    ]
    assert answer["longest_context"] == {"size": 8192, "limited_by": "model"}
    assert answer["largest_batch"]["size"] > 100
    assert answer["recommendation"]["device_map"] == {"": 0}
    device = answer["devices"][0]
    assert (
        0 < answer["headroom_bytes"][0] < device["capacity_bytes"] - device["peak_reserved_bytes"]
    )


def test_limits_for_people_end_with_lines_to_paste(command, needs_unasked, monkeypatch):
    monkeypatch.setattr("simgpu.advice.what_fits", lambda *given: None)
    code, out, err = command("fit", "--card", "L4", "--images", 0, "--new-tokens", 1, "--limits")
    assert (code, err) == (3, "")
    assert "Largest batch: 0 samples like this (not even one fits)" in out
    assert "Device map: none of the automatic ones fits" in out
    code, out, _ = command("fit", "--card", "H100", "--images", 0, "--new-tokens", 1, "--limits")
    assert code == 0
    assert "Longest context: 8192 text tokens (the model's context ends there)" in out
    assert 'AutoModelForCausalLM.from_pretrained(\n    "zai-org/glm-4v-9b",\n' in out


@pytest.fixture
def found(monkeypatch):
    """What the search for a frontier, which test_limits.py tests, is made to find."""
    batches = {1024: 130, 8192: 7}
    monkeypatch.setattr("simgpu.limits.frontier_tokens", lambda *given: list(batches))
    monkeypatch.setattr("simgpu.limits.frontier", lambda trials, workload, lengths: batches)
    return [{"text_tokens": 1024, "largest_batch": 130}, {"text_tokens": 8192, "largest_batch": 7}]


def test_a_frontier_is_drawn_and_its_points_are_in_the_json(command, tmp_path, found):
    picture = tmp_path / "what fits.png"
    options = ("--images", 0, "--new-tokens", 1, "--frontier", picture, "--json")
    code, out, err = command("fit", "--card", "H100", *options)
    assert (code, err) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(out)
    assert list(answer) == [*PLAIN, "frontier"]
    assert answer["frontier"] == {"file": str(picture), "points": found}


def test_a_disk_that_is_full_after_the_search_takes_no_answer_along(
    command, tmp_path, found, monkeypatch
):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    options = ("--images", 0, "--new-tokens", 1, "--frontier", tmp_path / "a.png", "--json")
    code, out, err = command("fit", "--card", "H100", *options)
    assert code == 1 and "No space left" in err
    assert json.loads(out)["frontier"]["points"] == found


WRONG_USE = {
    "many samples": (["--card", "L4", "--batch-size", "99999999999999999999"], "at most 1048576"),
    "module twice": (["--card", "L4", "--device-map", '{"a": 0, "a": 0}'], "stands there 2 times"),
    "tiny card": (["--card", "0.1GiB"], "that CUDA takes of a card like"),
    "picture of no kind": (
        ["--card", "L4", "--frontier", "a.gif"],
        "expected a name ending in .png",
    ),
    "picture in no folder": (
        ["--card", "L4", "--frontier", "no/such/a.png"],
        "There is no folder 'no/such'",
    ),
    "limits of an unknown card": (["--card", "L5", "--limits"], "'L5' is not in the catalogue"),
    "limits of too long a prompt": (
        ["--card", "L4", "--text-tokens", "6591", "--limits"],
        "takes 8193 positions",
    ),
    "unknown card": (["--card", "RTX 4091"], 'Did you mean "RTX 4090"?'),
    "no card": ([], "Missing option '--card'"),
    "unknown dtype": (
        ["--card", "L4", "--dtype", "bf16"],
        "dtype is 'bf16'; expected one of bfloat16, float16",
    ),
    "no cards": (["--card", "L4", "--count", "0"], "a rig has 1 to 16 cards"),
    "too many cards": (["--card", "L4", "--count", "17"], "a rig has 1 to 16 cards"),
    "not a number": (["--card", "L4", "--count", "two"], "Invalid value for '--count'"),
    "empty batch": (["--card", "L4", "--batch-size", "0"], "batch_size is 0"),
    "two images": (["--card", "L4", "--images", "2"], "at most one image per sample"),
    "no text": (["--card", "L4", "--text-tokens", "0"], "text_tokens is 0"),
    "negative": (["--card", "L4", "--new-tokens", "-1"], "new_tokens is -1"),
    "too long a prompt": (
        ["--card", "L4", "--text-tokens", "6591"],
        "takes 8193 positions (1602 of them the image)",
    ),
    "too long an answer": (
        ["--card", "L4", "--new-tokens", "8193"],
        "the model's whole context is 8192",
    ),
    "checkpointing without training": (
        ["--card", "L4", "--gradient-checkpointing"],
        "Set train as well",
    ),
    "unknown map": (
        ["--card", "L4", "--device-map", "fair"],
        "device_map is 'fair'; expected one of auto",
    ),
    "broken map": (["--card", "L4", "--device-map", '{"": 0'], "device_map is not JSON"),
    "incomplete map": (
        ["--card", "L4", "--device-map", '{"lm_head": 0}'],
        "gives no place to vision_tower",
    ),
    "map of all and more": (
        ["--card", "L4", "--device-map", '{"": 0, "lm_head": 0}'],
        'Give "" alone',
    ),
    "map with a typo": (
        ["--card", "L4", "--device-map", '{"vision_tower": 0, "lm_haed": 0}'],
        "Did you mean 'lm_head'?",
    ),
    "map with a far card": (
        ["--card", "L4", "--device-map", '{"": 1}'],
        "puts '' on 1; expected a card's number, 0 to 0",
    ),
    "unknown option": (["--card", "L4", "--kards", "2"], "No such option: --kards"),
    "one card and several": (["--card", "L4", "--cards", "L4,T4"], "leave --card, --count"),
}


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["", "json"])
@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_one_line_on_stderr_and_exit_code_2(command, case, json_option):
    options, expected = WRONG_USE[case]
    code, out, err = command("fit", *options, *json_option)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err
    assert "Traceback" not in err


def test_an_interrupted_command_exits_with_130_and_prints_nothing(command, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("simgpu.fitting.Deployment.fit", interrupted)
    assert command("fit", "--card", "L4") == (130, "", "")


def test_an_unknown_command_is_wrong_use(command):
    code, out, err = command("fitt")
    assert (code, out) == (2, "")
    assert err.startswith("error: No such command 'fitt'.") and err.count("\n") == 1


def test_without_arguments_the_help_is_shown(command):
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "fit" in out and "run" in out


def test_the_version_is_said_without_a_command(command):
    assert command("--version") == (0, f"glm4v-nb {glm4v_nb.__version__}\n", "")


# --- the process


def test_help_does_not_import_torch():
    began = time.perf_counter()
    code = (
        "import sys, glm4v_nb.cli; glm4v_nb.cli.main(['fit', '--help']); sys.exit('torch' in"
        " sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(f"fit --help took {time.perf_counter() - began:.2f} s")
    assert (process.returncode, process.stderr) == (0, "")
    for option in (
        "--card",
        "--count",
        "--dtype",
        "--device-map",
        "--batch-size",
        "--images",
        "--text-tokens",
    ):
        assert option in process.stdout
    for option in (
        "--new-tokens",
        "--train",
        "--gradient-checkpointing",
        "--limits",
        "--frontier",
        "--json",
    ):
        assert option in process.stdout


def test_what_does_not_fit_exits_with_3_and_writes_nothing_but_json_that_says_where_it_died():
    arguments = ["fit", "--card", "L4", "--count", "1", "--new-tokens", "1", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "glm4v_nb", *arguments], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (3, "")
    result = json.loads(process.stdout)
    assert result["verdict"] == "oom"
    assert (result["oom"]["device"], result["oom"]["phase"]) == (0, "load")
    assert result["oom"]["message"].startswith("CUDA out of memory. Tried to allocate")


def test_the_package_has_the_command_line_too():
    assert glm4v_nb.cli.main is main
