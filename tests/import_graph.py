"""The engine's import graph by rooms: its floors, its circles and the arrows that run upward.

    python -m tests.import_graph            prints rooms by floor, circles, upward arrows and long functions

A folder of engine/ppomax is one room; the two front doors, cli.py and engine.py, are one each. Imports count wherever
they stand, inside functions too; those for type checkers alone do as well. FLOORS is the order that the house keeps: a
room may import those before it."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "engine" / "ppomax"

FLOORS = (
    "config", "data", "assets", "sharding", "command", "models", "rollout", "saving", "recipe", "planning",
    "reporting", "engine", "ppomax", "stages", "default", "integrations", "cli", "__main__",
)  # fmt: skip
"""Lowest first. `ppomax` is the package's face, engine/ppomax/__init__.py."""


def module_of(path: Path, package: Path = ENGINE) -> str:
    """`ppomax.rollout.decode` of engine/ppomax/rollout/decode.py."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder, or the front door, that a module of the engine belongs to."""
    return module.split(".")[1] if "." in module else module


def modules() -> dict[str, Path]:
    """Every module of the engine by name; examples are users of the package, not a part of it."""
    return {module_of(p): p for p in sorted(ENGINE.rglob("*.py")) if "examples" not in p.parts}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The engine's modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known.keys()) or {node.module}
    return found & known.keys()


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports. A face is not a need of the parts that it gathers."""
    known = modules()
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    return {name: {n for n in needs if not name.startswith(f"{n}.")} for name, needs in graph.items()}


def room_graph() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for name, needs in module_graph().items():
        graph[room_of(name)] |= {room_of(n) for n in needs} - {room_of(name)}
    return dict(graph)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One way round for each name that a walk comes back to."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its floor: 1 for what imports no other room, else one above the highest that it imports."""
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            known[name] = 0  # of a room in a circle, so that the walk ends
            known[name] = 1 + max((floor(other) for other in graph.get(name, ())), default=0)
        return known[name]

    for name in graph:
        floor(name)
    return known


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows against the order of FLOORS."""
    return [(a, b) for a in graph for b in sorted(graph[a]) if FLOORS.index(b) > FLOORS.index(a)]


def main() -> None:
    graph = room_graph()
    for number in range(max(floors(graph).values()), 0, -1):
        rooms = sorted(name for name, floor in floors(graph).items() if floor == number)
        print(f"floor {number:2}  {'  '.join(rooms)}")
    round_rooms, round_modules = circles(graph), circles(module_graph())
    print(f"floors {max(floors(graph).values())}  circles {len(round_rooms) + len(round_modules)}", end="  ")
    print(f"upward arrows {len(upward(graph))}")
    for way in [*round_rooms, *round_modules]:
        print("circle: " + " -> ".join(way))
    for a, b in upward(graph):
        print(f"upward: {a} -> {b}")


if __name__ == "__main__":
    main()
