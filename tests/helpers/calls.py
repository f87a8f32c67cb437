"""How often a function of the package is called."""

import sys

import ffmerge_fast as ff


def count_calls(monkeypatch, function):
    """A list that grows by one entry with every call, whichever module of the package imported the function."""
    calls = []
    for name in ff.__all__:  # which are loaded when they are used
        getattr(ff, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ffmerge_fast":
            for attribute in [a for a, value in vars(module).items() if value is function]:
                monkeypatch.setattr(module, attribute, counted)
    return calls
