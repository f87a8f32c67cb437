"""The `ffmerge` command: whatever happens between its arguments and its answer ends here, in one line and a status."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from ..support.errors import FFMergeError
from .results import one_line, say


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 1 for a mistake or failure (one line on stderr); 130 after Ctrl-C; 141, as of any command that SIGPIPE ends,
    where nobody reads the answer. Usage errors raise SystemExit(2), help and --version SystemExit(0).
    """
    try:
        try:
            _run(argv)
        finally:
            _write()  # help was printed, perhaps
    except KeyboardInterrupt as stop:
        return _ended(130, str(stop) or "interrupted")
    except BrokenPipeError:
        return _ended(141)
    except Exception as error:
        return _ended(1, f"error: {one_line(error)}")
    return 0


def _run(argv: list[str] | None) -> None:
    """Parse, set up, run and print; the imports are here so that what goes wrong in them is answered too."""
    from .inputs import Inputs
    from .outputs import check_outputs
    from .parser import parse
    from .process import leave_job, set_up

    args = parse(argv)
    try:
        set_up(args)
        check_outputs(args)
        inputs = Inputs(args)
        result = inputs.dry_run() if getattr(args, "dry_run", False) else args.run(args, inputs)
        from ..support.distributed import rank  # with torch, which the set-up has imported

        if rank() == 0:
            _write(f"{result.shown(args.json)}\n")
    except Exception:
        if args.verbose:
            traceback.print_exc()
        raise
    finally:
        leave_job()


def _write(text: str = "") -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FFMergeError(f"standard output cannot be written ({error.strerror})") from error


def _ended(status: int, line: str = "") -> int:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # what cannot be written must not fail again at exit
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        say(line)
    return status
