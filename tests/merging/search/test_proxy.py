"""search(evaluate="proxy"): the summed errors of shared FFNs on their layers' own inputs."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import plant_copies_, tiny_inputs, tiny_model
from tests.merging.search.test_search import assert_untouched, state

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")
FAMILIES = ["gpt2", "llama", "phi3", "bert", "vit", "marian", "t5", "t5-gated", "sequential", "transformer_encoder"]


def setting(name, layers=5, window=3, **sizes):
    model = tiny_model(name, layers=layers)
    batches = [tiny_inputs(model, seed=i, **dict(batch=4, length=10, padded=True) | sizes) for i in range(4)]
    return model, ff.collect(model, batches, window=window), batches


def flows(model, batches, ffn):
    """Counted rows of (FFN input, FFN output, block output) of one FFN of an unmerged model, by hooks of our own."""
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    seen = [[], [], []]
    handles = [
        model.get_submodule(ffn.up_path).register_forward_pre_hook(lambda _, a: seen[0].append(a[0])),
        model.get_submodule(ffn.down_path).register_forward_hook(lambda _, a, y: seen[1].append(y)),
        model.get_submodule(ffn.path).register_forward_hook(
            lambda _, a, y: seen[2].append(y[0] if isinstance(y, tuple) else y)
        ),
    ]
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    torch.backends.mha.set_fastpath_enabled(True)
    for handle in handles:
        handle.remove()
    of_decoder = two_stacks and ffn.stack == "decoder"
    masks = [b["labels"] != -100 if of_decoder else b.get("attention_mask") for b in batches]
    return [torch.cat([counted(v, m) for v, m in zip(values, masks, strict=True)]).double() for values in seen]


def counted(value, mask):
    value = value.reshape(-1, value.shape[-1])
    return value if mask is None else value[mask.reshape(-1).bool()]


def apply(model, ffn, x):
    """The FFN as the model itself runs it, on any input."""
    acts = {"gelu": "none", "gelu_tanh": "tanh"}
    up = model.get_submodule(ffn.up_path)(x)
    gate = model.get_submodule(ffn.gate_path)(x) if ffn.gate_path else None
    if ffn.fused:
        gate, up = up.chunk(2, dim=-1)

    def act(t):
        if ffn.activation in acts:
            return torch.nn.functional.gelu(t, approximate=acts[ffn.activation])
        return getattr(torch.nn.functional, ffn.activation)(t)

    return model.get_submodule(ffn.down_path)(act(up) if gate is None else act(gate) * up)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_score_is_the_sum_of_relative_errors_on_the_layers_own_inputs(name):
    model, stats, batches = setting(name)
    model.double()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    stats.model = type(stats.model).of(model)
    before = state(model)
    found = ff.search(model, stats, 3, "proxy", batches=batches)
    assert_untouched(model, before)
    seen = {f.key: flows(model, batches, f) for f in ff.find_ffns(model)}
    assert len(found.search) == 3
    for layers, score in found.search:
        made = ff.merge(model, ff.plan(stats, layers))
        wanted = 0.0
        for ffn in ff.find_ffns(made):
            if (ffn.stack, ffn.index) in {(s, i) for s, group in ff.shared_groups(made) for i in group}:
                x, y, out = seen[ffn.key]
                with torch.no_grad():
                    error = (apply(made, ffn, x) - y).square().mean()
                wanted += (error / out.var(0, correction=0).mean()).item()
        assert score == pytest.approx(wanted, rel=1e-9)
    assert found.layers == min(found.search, key=lambda entry: entry[1])[0]
    assert len({score for _, score in found.search}) == 3


def test_equal_ffns_merge_without_error_and_are_found():
    model, _, batches = setting("gpt2", layers=6)
    ffns = ff.find_ffns(model)
    for ffn in ffns[3:5]:
        for path, source in zip(ffn.shared, ffns[2].shared, strict=True):
            model.get_submodule(path).load_state_dict(model.get_submodule(source).state_dict())
    stats = ff.collect(model, batches, window=3)
    found = ff.search(model, stats, 3, "proxy", batches=batches, method="average")
    scores = dict(found.search)
    assert found.layers == "2-4" and scores["2-4"] < 1e-10 < 1e-3 < min(v for k, v in scores.items() if k != "2-4")


def test_permuted_copies_are_equal_once_they_are_aligned():
    model = tiny_model("llama", layers=4)
    plant_copies_(model)
    batches = [tiny_inputs(model, batch=8, length=12, seed=i) for i in range(4)]
    stats = ff.collect(model, batches, window=2)
    aligned = ff.search(model, stats, 2, "proxy", batches=batches, method="weights")
    plain = ff.search(model, stats, 2, "proxy", batches=batches, method="average")
    assert max(s for _, s in aligned.search) < 1e-10 < 1e-3 < min(s for _, s in plain.search)


def test_exactly_max_tokens_count_and_no_more_batches_are_taken():
    model, stats, batches = setting("gpt2", padded=False)
    taken = []

    def counted():
        for batch in batches:
            taken.append(1)
            yield batch

    few = ff.search(model, stats, 2, "proxy", batches=counted(), max_tokens=40)
    assert len(taken) == 1
    assert few.search == ff.search(model, stats, 2, "proxy", batches=batches[:1]).search
    assert few.search != ff.search(model, stats, 2, "proxy", batches=batches).search
    cut = [{k: v[:3] for k, v in batches[0].items()}]
    for (_, a), (_, b) in zip(
        ff.search(model, stats, 2, "proxy", batches=batches, max_tokens=30).search,
        ff.search(model, stats, 2, "proxy", batches=cut).search,
        strict=True,
    ):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batches=None), "batches: missing, wanted data for evaluate='proxy'"),
        (dict(evaluate=lambda m: 1.0), "batches: only evaluate='proxy' takes them"),
        (dict(evaluate="exact"), "evaluate: got 'exact', wanted a function of the model that returns a number, or 'pr"),
        (dict(higher_is_better=True), "higher_is_better: the score of evaluate='proxy' is an error"),
        (dict(resume="scores.json"), "resume: evaluate='proxy' scores all windows in one pass"),
        (dict(max_tokens=1), "max_tokens: got 1, wanted at least 2"),
        (dict(batches=[]), "search: no calibration data"),
    ],
)
def test_bad_arguments(changes, message):
    model, stats, batches = setting("gpt2")
    with pytest.raises(ff.FFMergeError) as error:
        ff.search(**dict(model=model, stats=stats, window=2, evaluate="proxy", batches=batches) | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_error_in_the_data_leaves_the_model_as_it_was():
    model, stats, batches = setting("gpt2")
    before = state(model.train())

    def broken():
        yield batches[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        ff.search(model, stats, 2, "proxy", batches=broken())
    assert_untouched(model, before)
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
