"""The choice of a backend: automatic, forced by call, forced by the environment."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.common import backends

NOT_BUILT = "not built for this op in this version"


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("FFMERGE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_forced", None)


def test_backends_lists_every_op_and_reason():
    table = ff.backends()
    assert set(table) >= {"correlation", "assignment", "shared_ffn", "projection"}
    for reasons in table.values():
        assert set(reasons) == {"triton", "cpp", "reference"} and reasons["reference"] is None
        assert all(reason is None or (reason and "\n" not in reason) for reason in reasons.values())


def test_forced_backend_runs_and_is_restored():
    with ff.use_backend("reference"):
        assert backends._forced == "reference"
        assert ff.ops.assign(torch.eye(3)).objective == 3
        with ff.use_backend(None):
            assert backends._forced is None
        assert backends._forced == "reference"
    assert backends._forced is None
    with pytest.raises(RuntimeError), ff.use_backend("reference"):
        raise RuntimeError
    assert backends._forced is None
    ff.use_backend("reference")
    assert backends.select("assignment") is backends._load("ffmerge_fast.ops.assignment.reference")


def test_unknown_backend_is_refused_at_once():
    with pytest.raises(ff.FFMergeError, match="'cuda'.*choose one of triton, cpp, reference"):
        ff.use_backend("cuda")
    assert backends._forced is None


def test_forcing_what_cannot_run_raises_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "modules_of", lambda op: {"reference": f"ffmerge_fast.ops.{op}.reference"})
    with pytest.raises(ff.FFMergeError, match=f"cannot use backend 'cpp': {NOT_BUILT}"):
        ff.use_backend("cpp")
    for name, reason in {"cpp": NOT_BUILT, "nonsense": "unknown backend"}.items():
        monkeypatch.setenv("FFMERGE_BACKEND", name)
        message = f"backend '{name}' is forced but cannot run op 'assignment': {reason}"
        with pytest.raises(ff.FFMergeError, match=message):
            ff.ops.assign(torch.eye(3))
        with pytest.raises(ff.FFMergeError, match=reason):
            ff.ops.shared_ffn(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, 4))
        with ff.use_backend("reference"):  # beats the environment
            assert ff.ops.assign(torch.eye(3)).objective == 3


def test_the_first_backend_that_can_run_is_chosen(monkeypatch):
    from ffmerge_fast.ops.assignment import reference

    class Stub:
        @staticmethod
        def can_run(tensor=None):
            return "needs more rows" if tensor is not None and len(tensor[0]) < 4 else None

        @staticmethod
        def assign(scores, maximize):
            permutation, objective, gap = reference.assign(scores, maximize)
            return permutation, objective + 1000, gap

    load = backends._load
    modules = {"cpp": "stub", "reference": reference.__name__}
    monkeypatch.setattr(backends, "modules_of", lambda op: modules)
    monkeypatch.setattr(backends, "_load", lambda path: Stub if path == "stub" else load(path))
    assert ff.ops.assign(torch.eye(5)).objective == 1005
    assert ff.ops.assign(torch.eye(3)).objective == 3
    with ff.use_backend("cpp"), pytest.raises(ff.FFMergeError, match="needs more rows"):
        ff.ops.assign(torch.eye(3))
