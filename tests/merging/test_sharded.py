"""Statistics and plans of a model that FSDP2 has sharded."""

import torch

import ffmerge_fast as ff
from tests.helpers import sharded_collect_worker
from tests.helpers.ranks import run_two_ranks
from tests.helpers.tiny_models import tiny_model


def test_a_model_that_fsdp2_has_sharded(tmp_path):
    """Two ranks, half of the data each: the fingerprint, moments and plan of the whole model."""
    run_two_ranks("tests.helpers.sharded_collect_worker", tmp_path, timeout=120)
    model = tiny_model("llama")
    data = sharded_collect_worker.batches(model)
    wanted = ff.collect(model, data, window=3, max_tokens=2000)
    found = ff.CorrelationStats.load(tmp_path / "stats")
    assert found.model == wanted.model and found.tokens == wanted.tokens
    for pair in ((0, 1), (1, 3)):
        torch.testing.assert_close(found.correlation(*pair), wanted.correlation(*pair), rtol=0, atol=1e-6)
    kept = torch.load(tmp_path / "plan")
    assert kept == ff.plan(found, window=3, model=model).to_dict()
