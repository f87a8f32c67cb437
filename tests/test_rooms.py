"""The rooms of the package, read from its source: who may import whom, no circle, no private name of another room."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = """
    cli
    driver
    checkpoint
    baselines runtime analysis
    merging projecting
    calibration integrations
    models nn
    ops
    ops/<op>
    ops/common
    support remote_code testing
""".split("\n")[1:-1]  # a room may import those of lower lines; none of its own line, and nobody the package's own face
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
FLOOR |= {f"ops/{folder.name}": FLOOR["ops/<op>"] for folder in (ROOT / "ffmerge_fast" / "ops").glob("[a-z]*")} | FLOOR
MODULES = {  # dotted name: file
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "ffmerge_fast").rglob("*.py")
}


def room(module: str) -> str:
    return "/".join(module.split(".")[1 : 3 if ".ops." in module else 2])


def imports(module: str) -> Iterator[tuple[int, str, str, str]]:
    """(line, imported module, name taken from it or "", what it is called here), inside functions too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            found, name = alias.name, ""
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                found = f"{base}.{alias.name}"
                if found not in MODULES:
                    found, name = base, alias.name
            if found in MODULES:
                yield node.lineno, found, name, alias.asname or alias.name


def across_rooms() -> Iterator[tuple[str, str, int, str, str, str]]:
    """(room, module, line, imported room, name taken from it, what it is called here)"""
    for module in MODULES.keys() - {"ffmerge_fast"}:
        for line, found, name, here in imports(module):
            if room(found) != room(module) and name != "__version__":
                yield room(module), module, line, room(found), name, here


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_room_has_its_floor_and_is_named_for_newcomers():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms <= FLOOR.keys()
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"\w+", re.search(r"^## Rooms\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1])
    assert [r for r in sorted(rooms) if not {*r.split("/")} <= {*named}] == []


def test_imports_run_downwards():
    wrong = [x for x in across_rooms() if not FLOOR.get(x[0], 99) < FLOOR.get(x[3], -1)]
    assert sorted(f"{module}:{line} imports {other}" for _, module, line, other, *_ in wrong) == []


def test_no_circle_of_modules():
    TopologicalSorter({module: {found for _, found, *_ in imports(module)} for module in MODULES}).prepare()


def test_no_private_name_of_another_room():
    found = [f"{module}:{line} {name}" for _, module, line, _, name, _ in across_rooms() if private(name)]
    foreign = {(module, here) for _, module, _, _, _, here in across_rooms()}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and private(node.attr) and (module, ast.unparse(node.value)) in foreign:
                found.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    assert sorted(found) == []
