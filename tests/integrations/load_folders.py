"""Loads saved folders in a fresh process and writes what it found as JSON; started by test_transformers.py.

python load_folders.py MODE CASES.json FOUND.json, where MODE says what is imported:
    remote  the package cannot be imported; loads with trust_remote_code=True, and tries everything that must refuse
    before  transformers, then the package; no flag
    after   the package, then transformers; no flag
CASES.json: [{"name", "folder", "auto", "stock", "tensors" (inputs and "logits"), "tied": [[module path, ...], ...]}]
"""

import json
import sys
from pathlib import Path


def main(mode: str, cases: list[dict]) -> dict:
    if mode == "remote":
        sys.modules["ffmerge_fast"] = None  # from here on its import fails, installed or not
    if mode == "after":
        import ffmerge_fast  # noqa: F401

        assert "transformers" not in sys.modules
    import torch
    import transformers

    if mode == "before":
        import ffmerge_fast  # noqa: F401
    torch.set_num_threads(1)
    return {case["name"]: (_remote if mode == "remote" else _load)(transformers, case) for case in cases}


def _load(transformers, case: dict, folder: str | None = None, **options) -> dict:
    import torch
    from safetensors.torch import load_file

    auto = getattr(transformers, case["auto"])
    model, info = auto.from_pretrained(folder or case["folder"], output_loading_info=True, **options)
    inputs = load_file(case["tensors"])
    expected = inputs.pop("logits")
    with torch.no_grad():
        difference = (model.eval()(**inputs).logits - expected).abs().max().item()
    modules = [[model.get_submodule(path) for path in paths] for paths in case["tied"]]
    found = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "difference": difference,
        "tied": all(module is group[0] for group in modules for module in group),
    }
    return found | ({"again": _again(transformers, case, model, options)} if folder is None else {})


def _again(transformers, case: dict, model, options: dict) -> dict:
    """Save the loaded model and load that."""
    folder = f"{case['folder']}_again_{case['auto']}{len(options)}"
    model.save_pretrained(folder)
    size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    return _load(transformers, case, folder, **options) | {"bytes": size}


def _remote(transformers, case: dict) -> dict:
    found = _load(transformers, case, trust_remote_code=True)
    found["stock class"] = _error(getattr(transformers, case["stock"]).from_pretrained, case["folder"])
    found["untrusted"] = _error(getattr(transformers, case["auto"]).from_pretrained, case["folder"])
    found["imported"] = [name for name, m in sys.modules.items() if name.startswith("ffmerge_fast") and m is not None]
    try:
        import ffmerge_fast  # noqa: F401
    except ImportError:
        found["package"] = "absent"
    return found


def _error(load, folder: str) -> str:
    try:
        return f"loaded {type(load(folder)).__name__}"
    except Exception as error:
        return f"refused: {error}"


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
