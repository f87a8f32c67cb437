"""Make trained Transformers smaller: merge feed-forward sublayers, project whole models.

The public names are listed in `__init__.pyi` and imported when first used, so that `import ffmerge_fast` is quick.
"""

from importlib import metadata as _metadata

import lazy_loader as _lazy

from .integrations.transformers import register_when_imported as _register_when_imported
from .support.moved import name_the_new_home as _name_the_new_home

try:
    __version__ = _metadata.version("ffmerge_fast")
except _metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

_register_when_imported()
_name_the_new_home()

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
