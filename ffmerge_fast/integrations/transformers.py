"""Lets transformers' Auto classes load merged checkpoints with no flag after `import ffmerge_fast`.

transformers is neither needed nor imported here: registration waits until somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register the merged families now if transformers' Auto classes are loaded, else right after they are."""
    if _AUTO_CONFIG in sys.modules:
        _register_all()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module the ordinary way, and registers our families once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register_all()

            spec.loader.exec_module = exec_module
        return spec


def _register_all() -> None:
    from ..models import families

    for model_type in families.supported_families():
        _register(model_type)
    families.on_register(_register)


def _register(model_type: str) -> None:
    """Register a light config class under "ffmerge_<type>"; it becomes the real one when a checkpoint is read."""
    from transformers import AutoConfig
    from transformers.configuration_utils import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from ..models.families import MERGED_TYPE_PREFIX

    stock_name = CONFIG_MAPPING_NAMES.get(model_type)
    if stock_name is None:
        return

    def from_dict(cls, config_dict, **kwargs):
        from ..remote_code import modeling_ffmerge

        config_class = getattr(modeling_ffmerge, modeling_ffmerge.PREFIX + stock_name)
        modeling_ffmerge.register(config_class)
        return config_class.from_dict(config_dict, **kwargs)

    merged_type = MERGED_TYPE_PREFIX + model_type
    attributes = {"model_type": merged_type, "from_dict": classmethod(from_dict), "__module__": __name__}
    AutoConfig.register(merged_type, type(f"Lazy{stock_name}", (PretrainedConfig,), attributes), exist_ok=True)
