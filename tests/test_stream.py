"""Streamed models: bit-equal results, each weight read once per pass, never more than the budget, one-line errors."""

import contextlib
import copy
import gc
import os
import re
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast import _stream_source
from ffmerge_fast._stream_plan import parse_bytes
from tests.project.helpers import tied_layers
from tests.tiny import logits, tiny_inputs, tiny_model

FAMILIES = ("gpt2", "llama", "vit", "marian")
PLACES = ("host", "disk")


def model_of(family, merged=False, layers=6):
    """With `merged`, the FFNs of layers 1 to 3 (of each stack) are one."""
    model = tiny_model(family, layers)
    if not merged:
        return model
    plan = ff.plan(ff.collect(model, [tiny_inputs(model, batch=8)], window=3), layers="1-3")
    return ff.merge_(model, plan)


def needs(model):
    """Bytes for one layer at a time, and for the next one loaded meanwhile, from the error's text."""
    with pytest.raises(ff.FFMergeError) as error:
        ff.stream_(model, device="cpu", budget=1)
    assert "\n" not in str(error.value)
    found = re.search(r"wanted at least ([\d,]+): .*; ([\d,]+) to load the next layer meanwhile", str(error.value))
    return [int(group.replace(",", "")) for group in found.groups()]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def block_bytes(model):
    """Bytes of the weights of all blocks, each once."""
    blocks = [model.get_submodule(ffn.path) for ffn in ff.find_ffns(model)]
    return sum(p.nbytes for p in {p: None for block in blocks for p in block.parameters()})


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each weight that was loaded."""
    seen, load = [], _stream_source.Source.load

    def counted(source, weight):
        seen.append(weight.nbytes)
        return load(source, weight)

    monkeypatch.setattr(_stream_source.Source, "load", counted)
    return seen


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", [*FAMILIES, "t5", "transformer_encoder"])
def test_bit_equal_at_any_budget(family, place, merged):
    model = tied_layers(tiny_model(family, 4)) if merged and family == "t5" else model_of(family, merged)
    batches = [tiny_inputs(model, length=n, seed=n) for n in (5, 8, 2)]
    wanted, before = [logits(model, batch) for batch in batches], state(model)
    least, double = needs(model)
    some = (double + sum(p.nbytes for p in model.parameters())) // 2
    for budget in (least, double, some, "1GB"):
        with ff.stream_(model, "cpu", place, budget) as stream:
            for batch, result in zip(batches * 2, wanted * 2, strict=True):
                assert torch.equal(logits(model, batch), result)
            assert (stream.streamed_bytes > 0) == (budget != "1GB")
            assert equal(model.state_dict(), before)
        assert equal(model.state_dict(), before) and torch.equal(logits(model, batches[0]), wanted[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "marian"])
def test_deltas_go_with_their_layer_and_the_weights_they_share_are_read_once(family, place, reads):
    teacher = tiny_model(family, 6)
    model = ff.merge(teacher, ff.plan(layers="1-3", method="average", model=teacher))
    batches = [tiny_inputs(teacher, batch=4, seed=seed) for seed in range(3)]
    ff.local_distill_(model, teacher, batches, steps=5, delta_rank=2)
    wanted, before = logits(model, batches[0]), state(model)
    with ff.stream_(model, "cpu", place, needs(model)[0]) as stream:
        logits(model, batches[0])
        reads.clear()
        assert torch.equal(logits(model, batches[0]), wanted) and equal(model.state_dict(), before)
        assert sum(reads) == stream.streamed_bytes > 0
    assert equal(model.state_dict(), before) and torch.equal(logits(model, batches[0]), wanted)


def test_inference_mode_and_two_models_at_once():
    models = [tiny_model("gpt2", seed=0), tiny_model("gpt2", seed=1)]
    inputs = tiny_inputs(models[0])
    wanted = [logits(model, inputs) for model in models]
    for model in models:
        ff.stream_(model, "cpu", "disk", needs(model)[1])
    with torch.inference_mode():
        for model, result in zip(models * 2, wanted * 2, strict=True):
            assert torch.equal(model(**inputs).logits, result)
    for model, result in zip(models, wanted, strict=True):
        assert torch.equal(logits(ff.unstream_(model), inputs), result)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "marian"])
def test_generate(family, place, merged):
    model = model_of(family, merged)
    ids = tiny_inputs(model)["input_ids"]
    options = dict(max_new_tokens=6, min_new_tokens=6)
    for extra in ({"do_sample": False}, {"num_beams": 3}):
        wanted = model.generate(ids, **options, **extra)
        with ff.stream_(model, "cpu", place, needs(model)[1]):
            assert torch.equal(model.generate(ids, **options, **extra), wanted)


def test_a_decoder_is_not_read_for_each_encoder_pass(reads):
    """`generate` runs the encoder once and the decoder per token: so the decoder's weights stay first."""
    model = model_of("marian", layers=3)
    ids = tiny_inputs(model)["input_ids"]
    decoder = {n for n, _ in model.named_parameters() if n.startswith("model.decoder.layers")}
    with ff.stream_(
        model, "cpu", budget=needs(model)[1] + sum(model.get_parameter(n).nbytes for n in decoder)
    ) as stream:
        assert not any(n in decoder for w in stream._weights() for n in w.names)
        model.generate(ids, max_new_tokens=6, min_new_tokens=6)
    assert sum(reads) < 2 * stream.streamed_bytes + 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_per_pass_are_the_bytes_of_the_weights(family, place, reads):
    """Of a merged model fewer: exactly the ratio of the bytes."""
    per_pass = {}
    for merged in (False, True):
        model = model_of(family, merged)
        with ff.stream_(model, "cpu", place, needs(model)[1]) as stream:
            for _ in range(2):  # an encoder-decoder's order is known after the first
                logits(model, tiny_inputs(model))
            before = stream.read_bytes
            for _ in range(3):
                logits(model, tiny_inputs(model))
            per_pass[merged] = (stream.read_bytes - before) / 3
        assert per_pass[merged] == block_bytes(model) == stream.streamed_bytes
    ratio = block_bytes(model_of(family, True)) / block_bytes(model_of(family, False))
    assert per_pass[True] / per_pass[False] == ratio < 0.9


def test_a_tied_ffn_is_read_once_and_what_is_counted_was_read(reads):
    model = model_of("gpt2", merged=True)
    shared = {p.nbytes for p in model.transformer.h[1].mlp.parameters()}
    largest = max(shared)
    with ff.stream_(model, "cpu", "disk", needs(model)[1]) as stream:
        logits(model, tiny_inputs(model))
    first = sum(p.nbytes for p in model.transformer.h[0].parameters())
    assert sum(reads) == stream.streamed_bytes + first == stream.read_bytes + first  # the next pass's first block
    assert reads.count(largest) == 2 * (6 - 2 + 1)  # up and down of 4 FFNs, and of the next pass's first


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spare", ["least", "double", "half"])
def test_never_more_than_the_budget(family, merged, spare, monkeypatch):
    model = model_of(family, merged)
    least, double = needs(model)
    everything = sum(p.nbytes for p in model.parameters())
    budget = {"least": least, "double": double, "half": (double + everything) // 2}[spare]
    alive, most, load = weakref.WeakSet(), [], _stream_source.Source.load

    def counted(source, weight):
        tensor = load(source, weight)
        alive.add(tensor.untyped_storage())
        most.append(sum(storage.nbytes() for storage in alive))
        return tensor

    monkeypatch.setattr(_stream_source.Source, "load", counted)
    with ff.stream_(model, "cpu", "disk", budget) as stream:
        for seed in range(3):
            logits(model, tiny_inputs(model, seed=seed))
        assert stream.fixed_bytes + max(most) <= budget < everything
        if spare == "double":
            assert stream.fixed_bytes + max(most) > least  # it does load ahead
    del stream
    assert not alive


# --------------------------------------------------------------------------------------------------------------- files


def test_the_models_own_folder_is_read_in_place(tmp_path, reads):
    model_of("llama", merged=True).save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    wanted = logits(model, tiny_inputs(model))
    with ff.stream_(model, "cpu", "disk", needs(model)[0]) as stream:
        assert torch.equal(logits(model, tiny_inputs(model)), wanted)
        assert {e.file.path for e in stream._source._entries.values()} == {tmp_path / "model.safetensors"}
    assert reads


def test_what_the_folder_does_not_hold_is_written_and_removed(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    wanted = logits(model, tiny_inputs(model))
    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    files = {e.file.path for e in stream._source._entries.values()}
    (written,) = files - {tmp_path / "model.safetensors"}
    assert load_file(written).keys() == {"model.layers.2.mlp.up_proj.weight"}
    assert torch.equal(logits(model, tiny_inputs(model)), wanted)
    ff.unstream_(model)
    assert not written.parent.exists() and torch.equal(logits(model, tiny_inputs(model)), wanted)


def test_the_memory_is_let_go_of_and_a_dropped_model_leaves_no_file():
    model = tiny_model("gpt2")
    blocks = [weakref.ref(p.untyped_storage()) for p in model.transformer.h.parameters()]
    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    assert not any(ref() for ref in blocks)
    (folder,) = {e.file.path.parent for e in stream._source._entries.values()}
    logits(model, tiny_inputs(model))
    del model, stream
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:  # what is being read ahead holds it for a moment
        gc.collect()
        time.sleep(0.01)
    assert not folder.exists()


def test_weights_on_meta_come_from_the_folder(tmp_path):
    import transformers

    original = tiny_model("gpt2")
    original.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(original.config).eval()
    with pytest.raises(ff.FFMergeError, match=r"stream_: \S+ is on meta and the model has no folder; give folder="):
        ff.stream_(model, "cpu", "disk", "1MB")
    with pytest.raises(ff.FFMergeError, match="is on meta and .*empty does not hold it"):
        ff.stream_(model, "cpu", "disk", "1MB", folder=tmp_path / "empty")
    for place in PLACES:
        with ff.stream_(model, "cpu", place, needs(model)[1], folder=tmp_path):
            assert torch.equal(logits(model, tiny_inputs(model)), logits(original, tiny_inputs(original)))
            assert equal(model.state_dict(), original.state_dict())
        assert all(p.is_meta for p in model.parameters()) and model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("how", ["removed", "cut short", "overwritten", "replaced"])
@pytest.mark.parametrize("when", ["between passes", "in a pass"])
def test_a_file_that_goes_away(how, when, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    for parameter in model.parameters():  # of its own: those that stay would be maps of the file
        parameter.data = parameter.data.clone()
    file = tmp_path / "model.safetensors"
    backup = file.read_bytes()

    def damage(*_):
        if how == "removed":
            file.unlink()
        elif how == "cut short":
            os.truncate(file, 2000)
        elif how == "overwritten":
            file.write_bytes(backup[:-64] + b"\xff" * 64)
        else:
            save_file({name: t * 2 for name, t in load_file(file).items()}, tmp_path / "other")
            (tmp_path / "other").replace(file)

    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    logits(model, tiny_inputs(model))
    if when == "in a pass":
        model.model.layers[2].register_forward_hook(damage)
    else:
        damage()
    for _ in range(2):  # the next pass tells it, too
        with pytest.raises(ff.FFMergeError, match=f"stream_: {file}, which holds weights of the model, ") as error:
            for _ in range(2):
                logits(model, tiny_inputs(model))
        assert "\n" not in str(error.value)
    with pytest.raises(ff.FFMergeError, match="which holds weights of the model"):
        ff.unstream_(model)
    assert stream.streamed_bytes and model._weight_stream is stream


# -------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def refused(text):
    with pytest.raises(ff.FFMergeError, match=text) as error:
        yield
    assert "\n" not in str(error.value)


def test_bad_arguments():
    model = tiny_model("gpt2")
    before, hooks = state(model), len(model.transformer.h[0]._forward_pre_hooks)
    for device in ("tpu", "meta", 3.5):
        with refused(f"device: got {device!r}, wanted 'cpu', 'cuda'"):
            ff.stream_(model, device)
    if not torch.cuda.is_available():
        with refused("device: got 'cuda', but there are 0 CUDA devices"):
            ff.stream_(model)
    with refused("weights: got 'nvme', wanted 'host' or 'disk'"):
        ff.stream_(model, "cpu", "nvme")
    for budget in ("much", -1, "3 GX", True, None):
        with refused("budget: got .*, wanted bytes"):
            ff.stream_(model, "cpu", budget=budget)
    least, _ = needs(model)
    with refused(f"budget: got {least - 1:,} bytes, wanted at least {least:,}"):
        ff.stream_(model, "cpu", budget=least - 1)
    with refused("unstream_: this model is not streamed"):
        ff.unstream_(model)
    assert equal(model.state_dict(), before) and len(model.transformer.h[0]._forward_pre_hooks) == hooks
    assert (parse_bytes("20GiB"), parse_bytes("1.5 mb"), parse_bytes(7)) == (20 * 2**30, 1_500_000, 7)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    model = tiny_model("gpt2")
    before = state(model)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with refused("stream_: .*weights-.* cannot be written .*No space left.*; give another TMPDIR"):
        ff.stream_(model, "cpu", "disk", needs(model)[1])
    assert equal(model.state_dict(), before) and not hasattr(model, "_weight_stream")


def test_training_is_refused():
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    with ff.stream_(model, "cpu", budget=needs(model)[1]):
        model.train()
        with refused("a streamed model does inference only; call model.eval"):
            model(**inputs)
        model.eval()
        assert not model(**inputs).loss.requires_grad  # no graph that would hold all weights
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        with refused("a streamed model does inference only"):
            model(inputs_embeds=embedded)
    assert all(p.requires_grad for p in model.parameters())
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_changes_of_a_streamed_model_are_refused(place):
    model = tiny_model("gpt2")
    inputs, before = tiny_inputs(model), state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    ff.stream_(model, "cpu", place, needs(model)[1])
    for parameter in model.parameters():
        parameter.grad = None
    for change, name in (
        (lambda: model.load_state_dict(before), "load_state_dict"),
        (lambda: model.transformer.h[1].load_state_dict({}), "load_state_dict"),
        (optimizer.step, "optimizer.step"),
        (lambda: copy.deepcopy(model), "copy"),
        (lambda: copy.deepcopy(model.transformer.h[0]), "copy"),
        (lambda: ff.stream_(model, "cpu"), "stream_"),
    ):
        with refused(f"{name}: this model is streamed, its weights are not all in memory; call ffmerge_fast.unstream_"):
            change()
    other.step()
    assert torch.isfinite(logits(model, inputs)).all()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(0)
    with refused("stream_: transformer.h.0.mlp.c_fc.weight was changed while it is streamed"):
        logits(model, inputs)
        logits(model, inputs)
    ff.unstream_(model)
    if place == "disk":
        assert equal(model.state_dict(), before)
    optimizer.step()  # nothing is left behind


def test_a_converted_model_is_refused():
    model = tiny_model("llama")
    before = state(model)
    with ff.stream_(model, "cpu", "disk", needs(model)[1]):
        for layer in model.model.layers:
            layer.half()
        with refused("was changed while it is streamed"):
            logits(model, tiny_inputs(model))
    assert equal(model.state_dict(), before)


def test_unstreaming_leaves_nothing(tmp_path):
    model = model_of("gpt2", merged=True)
    model.transformer.wpe.weight.requires_grad_(False)
    parameters = list(model.parameters())
    addresses = [p.data_ptr() for p in parameters]
    hooks = [[len(h) for h in _hooks(m)] for m in model.modules()]
    threads = threading.active_count()
    ff.stream_(model, "cpu", "host", needs(model)[1])
    logits(model, tiny_inputs(model))
    model.save_pretrained(tmp_path / "saved")  # complete while streamed
    assert ff.unstream_(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses
    assert [p.requires_grad for p in parameters] == [p is not model.transformer.wpe.weight for p in parameters]
    assert [[len(h) for h in _hooks(m)] for m in model.modules()] == hooks and threading.active_count() == threads
    assert equal(ff.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())
    assert equal(copy.deepcopy(model).state_dict(), model.state_dict())


def _hooks(module):
    return (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)


def test_a_pass_that_was_broken_off():
    model = tiny_model("llama")
    wanted = logits(model, tiny_inputs(model))

    def stop(*_):
        raise KeyboardInterrupt

    with ff.stream_(model, "cpu", "disk", needs(model)[1]):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(model, tiny_inputs(model))
        handle.remove()
        assert torch.equal(logits(model, tiny_inputs(model)), wanted)
