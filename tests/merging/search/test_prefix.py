"""search skips the blocks before the window: the scores are the same bit for bit, and it does so only where it may."""

from types import SimpleNamespace

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import ALL, logits, tiny_inputs, tiny_model
from tests.merging.search.test_search import assert_untouched, setting, state

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")
FAMILIES = ["gpt2", "opt", "llama", "gemma2", "phi3", "bert", "vit", "marian", "t5", "whisper", "sequential",
            "transformer_encoder"]  # fmt: skip
LAYERS, WINDOW = 6, 3
WHOLE = [LAYERS] * 4  # blocks that run in one call of the model, window by window
BRANCHED = [6, 6, 5, 4]  # block i - 1 runs again before window i, and is kept


def blocks_of(model):
    ffns = ff.find_ffns(model)
    return [model.get_submodule(f.path) for f in ffns if f.stack == ffns[0].stack]


@pytest.fixture
def counted(monkeypatch):
    """`counted(model)`: a list of one entry per evaluation, how often blocks of the (first) stack ran in it."""

    def count(model):
        block = type(blocks_of(model)[0])
        run, runs, ours = block.forward, SimpleNamespace(windows=[]), {id(b) for b in blocks_of(model)}

        def forward(self, *args, **kwargs):
            runs.windows[-1] += id(self) in ours
            return run(self, *args, **kwargs)

        monkeypatch.setattr(block, "forward", forward)
        return runs

    return count


def searched(model, runs, evaluate, **options):
    """(scores of all windows, blocks run in each)."""
    stats = options.pop("stats")
    runs.windows = []

    def one(m):
        runs.windows.append(0)
        return evaluate(m)

    return ff.search(model, stats, WINDOW, one, **options).search, runs.windows


def plain_loss(batches):
    """An evaluation that may branch: no gradients, no cache."""

    def evaluate(m):
        extra = {"use_cache": False} if getattr(getattr(m, "config", None), "use_cache", False) else {}
        with torch.no_grad():
            outputs = [m(**batch, **extra) for batch in batches]
        return sum((o if isinstance(o, torch.Tensor) else o.logits).double().square().mean().item() for o in outputs)

    return evaluate


def case(name, count=2):
    model = tiny_model(name, layers=LAYERS)
    batches = [tiny_inputs(model, batch=3, length=7 + i, seed=i, padded=True) for i in range(count)]
    return model, ff.collect(model, [tiny_inputs(model, batch=8, seed=i) for i in range(3)], window=WINDOW), batches


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_scores_with_fewer_blocks(name, counted):
    model, stats, batches = case(name)
    runs, before = counted(model), state(model)
    whole, blocks = searched(model, runs, plain_loss(batches), stats=stats, prefix_memory=0)
    found, fewer = searched(model, runs, plain_loss(batches), stats=stats)
    assert found == whole and len({score for _, score in found}) == len(found)
    assert blocks == [2 * n for n in WHOLE] and fewer == [2 * n for n in BRANCHED]
    assert_untouched(model, before)
    assert not any("forward" in vars(b) for b in blocks_of(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(ALL[name].stacks) == len({f.stack for f in ff.find_ffns(model)})


def gradients(m, batch):
    loss = m(**batch, use_cache=False).loss
    loss.backward()
    m.zero_grad()
    return loss.item()


@torch.no_grad()
def default_cache(m, batch):
    return m(**batch).loss.item()


@torch.no_grad()
def own_cache(m, batch):
    first = m(input_ids=batch["input_ids"][:, :4])
    return m(input_ids=batch["input_ids"][:, 4:5], past_key_values=first.past_key_values).logits.sum().item()


@torch.no_grad()
def generated(m, batch):
    ids = m.generate(batch["input_ids"][:1, :3], max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
    return ids.float().sum().item() + m(**batch, use_cache=False).logits.sum().item()


@torch.no_grad()
def hidden_states(m, batch):
    return sum(h.sum().item() for h in m(**batch, use_cache=False, output_hidden_states=True).hidden_states)


@torch.no_grad()
def in_training_mode(m, batch):
    torch.manual_seed(0)
    m.train()
    return m(**batch, use_cache=False).loss.item()


@torch.no_grad()
def with_hooks(m, batch):
    seen = []
    handle = m.transformer.h[0].mlp.register_forward_hook(lambda _, a, y: seen.append(y.sum().item()))
    loss = m(**batch, use_cache=False).loss.item()
    handle.remove()
    return loss + seen[0]


@torch.no_grad()
def of_the_base_model(m, batch):
    return m.transformer(input_ids=batch["input_ids"], use_cache=False).last_hidden_state.abs().sum().item()


@pytest.mark.parametrize(
    "evaluate",
    [gradients, default_cache, own_cache, hidden_states, in_training_mode, with_hooks, of_the_base_model],
    ids=lambda f: f.__name__,
)
def test_calls_run_whole_where_skipping_could_show(evaluate, counted):
    model, stats, (batch, _) = case("gpt2")
    runs = counted(model)
    whole, blocks = searched(model, runs, lambda m: evaluate(m, batch), stats=stats, prefix_memory=0)
    found, same = searched(model, runs, lambda m: evaluate(m, batch), stats=stats)
    assert found == whole and same == blocks and blocks[0] in (LAYERS, 2 * LAYERS)


def test_generation_runs_whole_beside_calls_that_are_branched(counted):
    model, stats, (batch, _) = case("gpt2")
    runs = counted(model)
    whole, blocks = searched(model, runs, lambda m: generated(m, batch), stats=stats, prefix_memory=0)
    found, fewer = searched(model, runs, lambda m: generated(m, batch), stats=stats)
    assert found == whole and [a - b for a, b in zip(blocks, fewer, strict=True)] == [0, 0, 1, 2]


def test_other_arguments_than_last_time_run_whole(counted):
    model, stats, batches = case("gpt2", count=8)
    runs, calls = counted(model), iter(batches * 2)

    @torch.no_grad()
    def evaluate(m):
        return m(**next(calls), use_cache=False).loss.item()

    found, blocks = searched(model, runs, evaluate, stats=stats)
    assert blocks == WHOLE
    calls = iter(batches)
    assert found == searched(model, runs, evaluate, stats=stats, prefix_memory=0)[0]


def test_arguments_and_outputs_that_are_written_to_do_no_harm(counted):
    model, stats, (batch, _) = case("vit")
    runs = counted(model)

    @torch.no_grad()
    def evaluate(m):
        inputs = {k: v.clone() for k, v in batch.items()}
        output = m(**inputs).logits
        inputs["pixel_values"].zero_()
        return output.sum().item()

    whole, _ = searched(model, runs, evaluate, stats=stats, prefix_memory=0)
    found, fewer = searched(model, runs, evaluate, stats=stats)
    assert found == whole and fewer == BRANCHED


def test_beyond_its_memory_calls_run_whole(counted):
    model, stats, batches = case("gpt2", count=3)
    runs, equal = counted(model), [batches[0]] * 3
    whole, _ = searched(model, runs, plain_loss(equal), stats=stats, prefix_memory=0)
    arguments, output = sum(v.nbytes for v in batches[0].values()), 4 * 16 * batches[0]["input_ids"].numel()
    found, blocks = searched(model, runs, plain_loss(equal), stats=stats, prefix_memory=3 * arguments + 2 * output)
    assert found == whole and blocks == [n + 2 * fewer for n, fewer in zip(WHOLE, BRANCHED, strict=True)]


def test_a_resumed_search_begins_in_the_middle(counted, tmp_path):
    model, stats, batches = case("gpt2", count=1)
    runs, left = counted(model), [2]

    def killed(m):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain_loss(batches)(m)

    with pytest.raises(KeyboardInterrupt):
        searched(model, runs, killed, stats=stats, resume=tmp_path / "scores.json")
    assert not any("forward" in vars(b) for b in blocks_of(model)) and not model._forward_pre_hooks
    found, blocks = searched(model, runs, plain_loss(batches), stats=stats, resume=tmp_path / "scores.json")
    assert blocks == [6, 4]
    assert found == searched(model, runs, plain_loss(batches), stats=stats, prefix_memory=0)[0]


def test_a_model_with_a_forward_of_its_own_runs_whole(counted):
    model, stats, batches = case("gpt2", count=1)
    runs, block = counted(model), model.transformer.h[1]
    block.forward = block.forward
    found, blocks = searched(model, runs, plain_loss(batches), stats=stats)
    assert blocks == WHOLE and "forward" in vars(block) and logits(model, batches[0]).isfinite().all()


def test_compiled_models_run_whole(counted):
    model, stats, (batch, _) = case("sequential")
    runs = counted(model)

    @torch.no_grad()
    def evaluate(m):
        torch.compiler.reset()
        return torch.compile(m, backend="eager")(batch["input"]).square().mean().item()

    whole, _ = searched(model, runs, evaluate, stats=stats, prefix_memory=0)
    assert searched(model, runs, evaluate, stats=stats)[0] == whole


def test_bad_memory_is_refused():
    model, stats, loss = setting(window=3)
    with pytest.raises(ff.FFMergeError, match="prefix_memory: got 'much', want a number of bytes"):
        ff.search(model, stats, 3, loss, prefix_memory="much")
