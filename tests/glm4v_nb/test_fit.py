"""Will it fit? Verdicts of the full-size model on simulated cards."""

import json
from dataclasses import asdict, replace

import psutil
import pytest
from rig_fixtures import GIB

from glm4v_nb.fit import Deployment, cards_for_weights, fit, read_device_map
from glm4v_nb.workload import Workload
from simgpu import find_card
from simgpu.oom import parse_out_of_memory

SHORT = Workload(images=0, text_tokens=8, new_tokens=1)
WEIGHT_BYTES = 27_812_641_792
KEYS = ["verdict", "devices", "oom", "seconds", "provenance"]
KEYS += ["versions", "exact", "unmodelled", "assumed", "not_measured"]
# 0.0625 % for rounding to 512 bytes and the few buffers.
ROUNDING = 1.000625


def assert_consistent(result):
    """What holds for every answer."""
    for index, device in enumerate(result.devices):
        assert device.index == index
        card = find_card(device.card)
        assert device.capacity_bytes == card.total_bytes
        assert (
            0 <= device.weights_bytes <= device.peak_allocated_bytes <= device.peak_reserved_bytes
        )
        assert device.peak_reserved_bytes <= device.capacity_bytes - card.context_bytes
        assert device.free_at_peak_bytes >= 0
    assert result.fits == (result.verdict == "fits") == (result.oom is None)
    assert result.provenance == "simulated"
    assert result.seconds > 0
    if result.oom:
        assert (
            parse_out_of_memory(result.oom.message).device
            == result.oom.device
            < len(result.devices)
        )


def test_one_l4_runs_out_of_memory_while_loading_in_bfloat16():
    result = fit("L4", 1)
    assert_consistent(result)
    assert (result.verdict, result.oom.device, result.oom.phase) == ("oom", 0, "load")
    device = result.devices[0]
    assert 21 * GIB < device.weights_bytes == device.peak_allocated_bytes, "what had been loaded"


def test_two_l4_fit_with_the_standard_workload_and_the_json_has_exactly_its_keys():
    result = fit("L4", 2)
    assert_consistent(result)
    answer = json.loads(json.dumps(result.to_dict()))
    assert list(answer) == KEYS
    keys = [
        "index",
        "card",
        "capacity_bytes",
        "weights_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
    ]
    assert [list(device) for device in answer["devices"]] == [keys, keys]
    assert (answer["verdict"], answer["oom"], answer["provenance"]) == ("fits", None, "simulated")
    assert [device["card"] for device in answer["devices"]] == ["L4", "L4"]
    assert (
        WEIGHT_BYTES
        <= sum(device["weights_bytes"] for device in answer["devices"])
        < WEIGHT_BYTES * ROUNDING
    )


def test_the_json_of_a_failure_has_exactly_its_keys():
    answer = json.loads(json.dumps(fit("T4", 1, workload=SHORT).to_dict()))
    assert list(answer) == [*KEYS, "needs_bytes"]
    assert list(answer["oom"]) == ["device", "phase", "message"]
    assert answer["verdict"] == "oom"
    assert answer["needs_bytes"] > answer["devices"][0]["capacity_bytes"]


@pytest.mark.parametrize(
    ("card", "count", "workload"),
    [
        ("L4", 1, SHORT),
        ("T4", 2, Workload(images=1, new_tokens=0)),
        ("L4", 2, Workload(batch_size=24, images=0, text_tokens=2000, new_tokens=2)),
    ],
    ids=["load", "prefill", "decode"],
)
def test_on_cards_of_just_what_it_says_it_needs_a_run_fits(card, count, workload):
    deployment = Deployment(card, count, "bfloat16")
    result = fit(card, count, workload=workload)
    assert not result.fits
    assert all(
        size >= device.weights_bytes
        for size, device in zip(result.needs, result.devices, strict=True)
    )
    total_bytes = max(result.needs)
    assert total_bytes == result.needs[result.oom.device] > find_card(card).total_bytes
    enough = replace(find_card(card), total_bytes=total_bytes)
    assert fit(enough, count, device_map=deployment.placement(), workload=workload).fits


def test_less_room_than_such_cards_differ_in_is_said_to_just_fit():
    result = fit("T4", 2, "float16", workload=Workload(new_tokens=1))
    spare = min(device.free_at_peak_bytes for device in result.devices)
    assert result.fits and result.just_fits
    assert spare < find_card("T4").uncertainty_bytes
    assert not fit("L4", 2, workload=SHORT).just_fits
    assert not fit("L4", 1, workload=SHORT).just_fits


def test_a_card_by_name_and_size_is_simulated_and_what_is_assumed_stands_beside_the_figures():
    result = fit("My GPU 30GiB", 1, workload=SHORT)
    assert result.fits
    assert (result.devices[0].card, result.devices[0].capacity_bytes) == ("My GPU 30GiB", 30 * GIB)
    assumed = "My GPU 30GiB: 30.00 GiB as PyTorch sees it, all else assumed as of RTX 5090"
    assert result.provenance == f"simulated ({assumed})"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 10**9}, "batch_size is 1000000000; expected at most 1048576"),
        ({"batch_size": 10**20}, "expected at most 1048576"),
        ({"text_tokens": 10**12}, "Lower text_tokens"),
        ({"new_tokens": 10**12}, "Lower new_tokens"),
        ({"batch_size": True}, "batch_size is True; expected a whole number"),
        ({"images": 10**6}, "at most one image per sample"),
    ],
)
def test_absurd_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        fit("L4", workload=Workload(**sizes))


def test_the_largest_batch_that_is_accepted_is_answered_without_its_prompt_in_memory():
    before = psutil.Process().memory_info().rss
    result = fit("H200", 16, workload=Workload(batch_size=2**20, text_tokens=6000, new_tokens=0))
    assert result.oom.phase == "prefill"
    # Its token ids alone would take 64 GB.
    assert psutil.Process().memory_info().rss - before < GIB


def test_float16_takes_what_bfloat16_takes():
    result = fit("L4", 2, "float16", workload=SHORT)
    assert_consistent(result)
    assert result.fits
    assert (
        WEIGHT_BYTES
        <= sum(device.weights_bytes for device in result.devices)
        < WEIGHT_BYTES * ROUNDING
    )


def test_float32_needs_twice_as_much_and_two_l4_no_longer_do():
    result = fit("L4", 2, "float32", workload=SHORT)
    assert_consistent(result)
    assert result.oom.phase == "load"
    larger = fit("A100-40", 2, "float32", workload=SHORT)
    assert_consistent(larger)
    assert larger.fits
    loaded = sum(device.weights_bytes for device in larger.devices)
    assert 2 * WEIGHT_BYTES <= loaded < 2 * WEIGHT_BYTES * ROUNDING


def test_one_large_card_holds_it_all():
    result = fit("h100", workload=SHORT)
    assert_consistent(result)
    assert result.fits
    assert result.devices[0].card == "H100", "the catalogue's own name"


def test_another_strategy_gives_another_answer():
    result = fit("L4", 3, device_map="sequential", workload=SHORT)
    assert_consistent(result)
    assert result.fits
    assert result.devices[0].weights_bytes > 18 * GIB, "the first card is filled first"
    assert result.devices[2].weights_bytes == 0


def test_a_map_of_ones_own_is_followed():
    result = fit(
        "L4", 2, device_map={"vision_tower": 1, "language_model": 0, "lm_head": 1}, workload=SHORT
    )
    assert_consistent(result)
    assert result.fits
    assert result.devices[1].weights_bytes == pytest.approx(
        2 * (4_506_369_536 + 620_756_992), rel=1e-4
    )


def test_what_a_map_leaves_on_the_cpu_takes_no_room_on_the_cards():
    result = fit(
        "L4",
        1,
        device_map={"vision_tower": "cpu", "language_model": 0, "lm_head": 0},
        workload=SHORT,
    )
    assert_consistent(result)
    assert result.fits
    assert result.devices[0].weights_bytes == pytest.approx(2 * 9_399_951_360, rel=1e-4)


def test_a_large_batch_runs_out_of_memory_in_prefill():
    result = fit(
        "L4", 2, workload=Workload(batch_size=256, images=0, text_tokens=1000, new_tokens=1)
    )
    assert_consistent(result)
    assert result.oom.phase == "prefill"


def test_a_growing_cache_runs_out_of_memory_in_decode():
    # 40 KiB a token: 4000 samples of 128 tokens take 19.5 GiB, and 17.6 GiB are free.
    result = fit(
        "L4", 2, workload=Workload(batch_size=4000, images=0, text_tokens=8, new_tokens=120)
    )
    assert_consistent(result)
    assert result.oom.phase == "decode"


def test_a_training_step_needs_gradients_and_runs_out_of_memory_in_backward():
    workload = Workload(text_tokens=2000, train=True)
    result = fit("L4", 3, workload=workload)
    assert_consistent(result)
    assert result.oom.phase == "backward"
    checkpointed = fit(
        "L4", 3, workload=Workload(**{**asdict(workload), "gradient_checkpointing": True})
    )
    assert_consistent(checkpointed)
    assert checkpointed.fits


def test_a_prompt_of_the_whole_context_is_taken_and_one_more_token_refused():
    assert fit("H200", workload=Workload(images=0, text_tokens=8192, new_tokens=1)).fits
    with pytest.raises(
        ValueError, match="The prompt takes 8193 positions, but the model's context is 8192"
    ):
        fit("H200", workload=Workload(images=0, text_tokens=8193, new_tokens=1))
    with pytest.raises(ValueError, match=r"takes 8193 positions \(1602 of them the image\)"):
        fit("L4", workload=Workload(images=1, text_tokens=6591))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"text_tokens": 0}, "text_tokens is 0"),
        ({"text_tokens": 1.5}, "text_tokens is 1.5"),
        ({"new_tokens": -1}, "new_tokens is -1; expected a whole number of at least 0"),
        ({"images": -1}, "images is -1"),
        ({"images": 2}, "at most one image per sample"),
        ({"gradient_checkpointing": True}, "Set train as well"),
    ],
)
def test_an_impossible_workload_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Workload(**sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"card": "L5"}, "'L5' is not in the catalogue"),
        ({"count": 0}, "a rig has 1 to 16 cards"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16, float16, float32"),
        ({"device_map": "fair"}, "device_map is 'fair'; expected one of auto"),
        ({"device_map": {"": 1}}, "puts '' on 1; expected a card's number, 0 to 0"),
        ({"device_map": {"": True}}, "puts '' on True"),
        ({"device_map": {"": "disk"}}, "puts '' on 'disk'"),
        ({"device_map": {"vision": 0}}, "names 'vision', which the model does not have"),
        (
            {"device_map": {"vision_tower": 0}},
            "gives no place to language_model.embed_tokens.weight",
        ),
        ({"device_map": {}}, "gives no place to vision_tower"),
        ({"device_map": {"lm_head.weight": 0}}, "names 'lm_head.weight'.*Did you mean 'lm_head'"),
        ({"device_map": {"transformer.visio": 0}}, "names 'transformer.visio', which the model"),
        ({"device_map": {"": 0, "lm_head": 0}}, 'Give "" alone'),
        (
            {"device_map": {"vision_tower": 0, "vision_tower.conv": "cpu"}},
            "puts 'vision_tower.conv' on 'cpu', inside 'vision_tower' on 0.*leave out the inner",
        ),
        (
            {"device_map": {"language_model.layers.3.mlp": "cpu", "language_model.layers": 0}},
            "'language_model.layers.3.mlp' on 'cpu', inside 'language_model.layers' on 0",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(**arguments)


def test_a_device_map_may_have_official_names_and_each_module_one_place():
    official = {"transformer.vision": 1, "transformer.encoder": 0, "transformer.embedding": 0}
    official |= {"transformer.rotary_pos_emb": 0, "transformer.output_layer": 0}
    deployment = Deployment(count=2, device_map=official)
    deployment.check(SHORT)
    assert deployment.placement()["vision_tower"] == 1
    with pytest.raises(ValueError, match="'lm_head' here, which has 0 already, and 1 is another"):
        Deployment(count=2, device_map=official | {"lm_head": 1}).check(SHORT)


def test_a_device_map_is_read_from_a_name_an_object_or_a_file(tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"": 0}')
    assert read_device_map("auto") == "auto"
    assert read_device_map(' {"": 0}') == read_device_map(str(path)) == {"": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0]", "There is no file of that name"),
        ("{0}", "device_map is not JSON"),
        ("", "There is no file"),
        ("m" * 5000, "There is no file"),
        ('{"lm_head": 0, "lm_head": 1}', "'lm_head' stands there 2 times; give each module one"),
        ('{"a": {"b": 0, "b": 0}}', "'b' stands there 2 times"),
        ('{"a":' * 10**5, "is not JSON: maximum recursion depth"),
    ],
)
def test_a_text_that_is_no_device_map_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_device_map(text)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["[0]", "0", '"auto"'])
def test_a_file_without_an_object_is_refused_and_named(tmp_path, content):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="map.json holds no JSON object"):
        read_device_map(str(path))


@pytest.mark.parametrize(
    ("card", "dtype", "count"),
    [("L4", "bfloat16", 2), ("L4", "float32", 3), ("T4", "bfloat16", 2), ("H100", "float16", 1)],
)
def test_the_least_number_of_cards_is_the_weights_divided_by_what_a_card_has(card, dtype, count):
    assert cards_for_weights(card, dtype) == count
