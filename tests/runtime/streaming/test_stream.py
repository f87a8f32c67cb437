"""Streamed models: bit-equal results, each weight read once per pass, never more than the budget."""

import weakref

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.runtime.streaming import source
from tests.helpers.projecting import tied_layers
from tests.helpers.streaming import FAMILIES, PLACES, block_bytes, equal, model_of, needs, state
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each weight that was loaded."""
    seen, load = [], source.Source.load

    def counted(source, weights):
        seen.extend(weight.nbytes for weight in weights)
        return load(source, weights)

    monkeypatch.setattr(source.Source, "load", counted)
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
@pytest.mark.parametrize("own", ["deltas", "neurons"])
def test_what_a_layer_has_of_its_own_goes_with_it_and_shared_weights_are_read_once(own, family, place, reads):
    teacher = tiny_model(family, 6)
    model = ff.merge(teacher, ff.plan(layers="1-3", method="average", model=teacher))
    batches = [tiny_inputs(teacher, batch=4, seed=seed) for seed in range(3)]
    if own == "deltas":
        ff.local_distill_(model, teacher, batches, steps=5, delta_rank=2)
    else:
        ff.refit_(model, teacher, batches, private=3)
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
    alive, most, pages, load = weakref.WeakSet(), [], [], source.Source.load

    def counted(source, weights):
        tensors = load(source, weights)
        alive.update(tensor.untyped_storage() for tensor in tensors)
        most.append(sum(storage.nbytes() for storage in alive))
        pages.append(sum(memory.nbytes for memory, _ in source._memory._lent))
        return tensors

    monkeypatch.setattr(source.Source, "load", counted)
    with ff.stream_(model, "cpu", "disk", budget) as stream:
        for seed in range(3):
            logits(model, tiny_inputs(model, seed=seed))
        assert stream.fixed_bytes + max(most) <= stream.fixed_bytes + max(pages) <= budget < everything
        if spare == "double":
            assert stream.fixed_bytes + max(most) > least  # it does load ahead
        memory = [weakref.ref(memory) for memory, _ in stream._source._memory._lent]
        assert all(ref() is not None for ref in memory)
    assert not alive and all(ref() is None for ref in memory)


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


@pytest.mark.parametrize("place", PLACES)
def test_what_others_keep_of_a_weight_is_not_overwritten(place):
    """Memory is used again, but not while any tensor is in it."""
    model = tiny_model("llama", layers=6)
    before = state(model)
    name = "model.layers.{}.mlp.up_proj.weight"
    kept, addresses = [], []

    def keep(step):
        weight = model.get_parameter(name.format(step))
        addresses.append(weight.data_ptr())
        if step % 2:
            kept.append((step, weight.detach()[1:]))

    for step, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, step=step: keep(step))
    with ff.stream_(model, "cpu", place, needs(model)[1]):
        for _ in range(3):
            logits(model, tiny_inputs(model))
        assert len(set(addresses[::2])) <= 2  # of three passes' even steps, of which nothing was kept
        for step, weight in kept:
            assert torch.equal(weight, before[name.format(step)][1:])


def test_a_resident_block_does_not_stop_the_reading():
    """While the block before a resident one runs, the next block that is not resident is loaded."""
    model = tiny_model("gpt2", layers=6)
    budget = needs(model)[1] + 500
    model = ff.tie_without_average(model, "0-5")
    with ff.stream_(model, "cpu", "disk", budget) as stream:
        streamed = {step for parcel in stream._parcels for step in parcel.steps}
        (resident,) = set(range(6)) - streamed
        loading = {}
        for step, block in enumerate(model.transformer.h):
            block.register_forward_hook(lambda *_, step=step: loading.update({step: [*stream._loader.pending]}))
        for _ in range(2):
            logits(model, tiny_inputs(model))
    for step, pending in loading.items():
        after = (step + 1) % 6 if (step + 1) % 6 != resident else (step + 2) % 6
        assert [parcel.steps for parcel in pending] == [{after}]
