"""A plugin of pytest for Triton's interpreter: half of its time goes into patching `triton.language` at every call.

A launch patches it, and so does every call of a device function in it, again and for good. Here a launch patches all
that device functions use, and their calls nothing.
"""

from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_uses_all = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
interpreter._patch_lang = lambda fn: _patch(_uses_all)
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
