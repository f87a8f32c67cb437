"""Fails, in one line, if a wheel of this package lacks a file it needs or carries one it must not."""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_DATA = ("ffmerge_fast/py.typed", "ffmerge_fast/_C.pyi", "ffmerge_fast/__init__.pyi")


def problems(wheel: Path, extension: bool) -> list[str]:
    """What is wrong with the wheel's list of files."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ffmerge_fast").rglob("*.py")}
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ffmerge_fast").rglob("configs/*.json")}
    packed = {name for name in names if ".dist-info/" not in name}
    compiled = {name for name in packed if name.startswith("ffmerge_fast/_C.") and not name.endswith(".pyi")}
    wanted = sources | configs | set(NEEDED_DATA)
    found = [f"missing {name}" for name in sorted(wanted - packed)]
    found += [f"must not be there: {name}" for name in sorted(packed - wanted - compiled)]
    if len(compiled) != int(extension):
        found.append(f"wanted {int(extension)} compiled extension, found {sorted(compiled)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--without-extension", action="store_true")
    args = parser.parse_args()
    found = problems(args.wheel, extension=not args.without_extension)
    if found:
        print(f"{args.wheel.name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
