"""Fast decoding where tensors have no numbers: the same code, its memory, and ``fit`` with it."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from rig_fixtures import GOLDEN, MIB, split_in_two
from rig_fixtures import load as load_model

from glm4v_nb.cli import main
from glm4v_nb.fit import Deployment, fit
from glm4v_nb.inference import Sampling, generate, load, set_decoding, stream
from glm4v_nb.inference.decoding import arguments
from glm4v_nb.miniature import CHECKPOINT, sample_pictures
from glm4v_nb.workload import Workload, make_prompt
from simgpu import Rig
from simgpu.limits import Trials, frontier, largest_batch, longest_context

ASKED = [{"role": "user", "image": sample_pictures()["One shape"], "content": "What colour?"}]
TEXT = Workload(images=0, text_tokens=100, new_tokens=20)


@pytest.fixture(autouse=True)
def no_tiles_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    assert not list(tmp_path.iterdir()), "tiles of a simulated card were kept"


@pytest.mark.parametrize(("decoding", "steps"), [("fast", 5), ("lookup", 3)])
def test_answers_come_and_what_decoding_takes_is_given_back(decoding, steps):
    with Rig.simulated("L4", 1, "") as rig, warnings.catch_warnings():
        warnings.simplefilter("error")
        model, processor = load(CHECKPOINT, decoding=decoding)
        assert generate(model, processor, ASKED, Sampling(6)).new_tokens == 6
        assert model.fast_decoder.steps == steps
        with stream(model, processor, ASKED, Sampling(6, temperature=0.7)) as pieces:
            "".join(pieces)
        assert pieces.answer.finish == "length"
        kept, taken = torch.cuda.memory_allocated(), model.fast_decoder.memory()
        cached = sum(each.bytes for each in rig.blocks() if each.purpose == "KV cache")
        assert cached == taken["fixed cache"]
        set_decoding(model, "eager")
        del pieces
        given_back = kept - torch.cuda.memory_allocated()
        assert 0 <= given_back - taken["fixed cache"] - taken["buffers"] < MIB // 8  # whole blocks


@pytest.mark.parametrize("keep", [["lm_head"], []])
def test_int8_weights_are_taken_where_they_are(keep):
    pytest.importorskip("torchao", reason="torchao is not installed")
    with Rig.simulated("L4", 1, ""), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, processor = load(CHECKPOINT, weights="int8", keep=keep)
        generate(model, processor, ASKED, Sampling(6))  # after it libraries' workspaces are there
        before = torch.cuda.memory_allocated()
        set_decoding(model, "fast")
        assert generate(model, processor, ASKED, Sampling(6)).new_tokens == 6
        assert model.fast_decoder.steps == 5
        set_decoding(model, "eager")
        # Queries, keys and values, which became one, are in fewer blocks than before.
        assert torch.cuda.memory_allocated() <= before + MIB // 8


def test_groups_that_the_kernels_do_not_take_are_named():
    pytest.importorskip("torchao", reason="torchao is not installed")
    with Rig.simulated("L4", 1, ""):
        with pytest.warns(UserWarning, match=r"Int4TilePackedTo4dTensor in blocks of \[1, 64\]"):
            load(CHECKPOINT, weights="int4", decoding="fast")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fit_takes_quantised_weights_and_fast_decoding_together(weights):
    """At full size, where a card's groups are of 128."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    found = fit("L4", 1, workload=TEXT, weights=weights, decoding="fast")
    assert found.fits
    assert found.decoding_bytes["fixed cache"] == 40 * 2 * 1024 * 2 * 128 * 2


def test_two_cards_have_a_graph_each_and_an_end_on_another_card_is_said():
    with Rig.simulated("L4", 2, ""):
        model = load_model(device_map=split_in_two())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_decoding(model, "fast")
            ids = torch.arange(20)[None].to("cuda")
            model.generate(ids, max_new_tokens=4, do_sample=False, **arguments(model, None))
        assert len(model.fast_decoder._steps[1]._work) == 2
        other = load_model(device_map=split_in_two() | {"language_model.embed_tokens": 1})
        with pytest.warns(UserWarning, match="embedding, norm or head is on another card"):
            set_decoding(other, "fast")


def test_an_older_card_gives_the_sentence_and_the_rung_below():
    with Rig.simulated("T4", 1, ""):
        sentence = "a card is older than Ampere; compiled is taken instead"
        with pytest.warns(UserWarning, match=sentence):
            model, processor = load(CHECKPOINT, dtype=torch.float16, decoding="fast")
        with pytest.warns(UserWarning, match="torch.compile runs the model as it is"):
            assert generate(model, processor, ASKED, Sampling(3)).new_tokens == 3
        assert model.fast_decoder.steps == 0


@pytest.mark.parametrize("decoding", ["fast", "lookup", "static"])
def test_fit_takes_what_generate_does(decoding):
    found = fit("L4", 1, workload=TEXT, checkpoint=GOLDEN, decoding=decoding)
    with Rig.simulated("L4", 1, ""):
        model = load_model(device_map={"": 0})
        prompt = make_prompt(model, TEXT)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        set_decoding(model, decoding)
        model.generation_config.eos_token_id = None
        model.generate(**prompt, max_new_tokens=20, do_sample=False, **arguments(model, None))
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    (card,) = found.devices
    # generate has masks and lists of stopped prompts besides.
    assert 0 <= peaks[0] - card.peak_allocated_bytes <= MIB // 32
    assert peaks[1] == card.peak_reserved_bytes
    caches = {"static": 119, "fast": 1024, "lookup": 1024}
    name = "static cache" if decoding == "static" else "fixed cache"
    assert found.decoding_bytes[name] == caches[decoding] * 3 * 2 * 2 * 16 * 2


def test_fit_says_what_fast_decoding_takes(capsys):
    arguments = ["fit", "--model", str(GOLDEN), "--card", "L4", "--decoding", "fast"]
    assert main([*arguments, "--tokens", "50"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "For fast decoding (simulated), in these: fixed cache 384.0 KiB, buffers" in said
    assert main([*arguments, "--tokens", "50", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["decoding"]
    assert answer["method"] == "fast" and answer["fixed_cache_bytes"] == 384 * 1024
    assert answer["pools_of_graphs_bytes"] == 0  # a vocabulary so small is searched without


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoding": "compiled"}, "'compiled', which is not simulated.*Take 'static'"),
        ({"decoding": "faster"}, "'faster'; simulated of .* is 'eager' or 'static' or 'fast'"),
        ({"decoding": "fast", "card": "T4"}, "'fast', but a card is older than Ampere.*Take eager"),
        ({"decoding": "fast", "workload": replace(TEXT, batch_size=9)}, "at most 8 samples"),
        (
            {"decoding": "fast", "workload": Workload(images=0, new_tokens=0, train=True)},
            "a training step decodes nothing",
        ),
        (
            {"decoding": "fast", "workload": replace(TEXT, text_tokens=240)},
            "260 positions together, but the model's context is 256",
        ),
    ],
)
def test_what_cannot_be_decoded_so_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        fit(**{"card": "L4", "workload": TEXT, "checkpoint": GOLDEN} | options)


def test_other_models_know_eager_alone(tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="simulated of LlamaForCausalLM is 'eager'"):
        Deployment("L4", checkpoint=LlamaConfig(num_hidden_layers=1), decoding="fast").check(TEXT)


@pytest.fixture(scope="module")
def trials():
    return Trials(Deployment("L4", checkpoint=GOLDEN, decoding="fast"))


def test_limits_end_where_fast_decoding_does(trials):
    edge = largest_batch(trials, TEXT)
    assert (edge.size, edge.limited_by) == (8, "decoding")
    edge = longest_context(trials, TEXT)
    assert (edge.size, edge.limited_by) == (236, "model")
    assert frontier(trials, TEXT, [100]) == {100: 8}
