"""The house stands: imports run down (engine -> kernels -> csrc), in no circle; Triton only in *_triton files; files,
functions and parameter lists are short; style and types are clean."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import import_graph

ROOT = Path(__file__).resolve().parents[1]
KERNELS, ENGINE = ROOT / "kernels" / "ppomax_kernels", ROOT / "engine" / "ppomax"
SOURCES = sorted(p for top in (KERNELS, ENGINE) for p in top.rglob("*.py") if "examples" not in p.parts)
# What may import triton: the kernels, and nothing else; the dispatcher and the list of back-ends ask whether it is
# there.
TRITON = {"dispatch.py", "__main__.py"}
HEAVY = {"transformers", "deepspeed", "datasets", "ppomax", "safetensors", "yaml"}


def name_of(path: Path) -> str:
    parts = path.relative_to(KERNELS.parent if path.is_relative_to(KERNELS) else ENGINE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_load: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports; with `at_load` only those imported as the file is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = set()
    for node in _walk(tree, at_load):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return found


def _walk(node: ast.AST, at_load: bool):  # type: ignore[no-untyped-def]
    for child in ast.iter_child_nodes(node):
        if at_load and (
            isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _for_types_only(child)
        ):
            continue
        yield child
        yield from _walk(child, at_load)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_down(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    if path.is_relative_to(KERNELS):
        assert not tops & HEAVY, f"{path.name} imports {sorted(tops & HEAVY)}: the kernels need torch alone"
    assert not tops & {"tests", "bench"}, f"{path.name} imports tests or bench"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_triton_files_import_triton(path: Path) -> None:
    if any(name.split(".")[0] == "triton" for name in imports(path)):
        allowed = path.is_relative_to(KERNELS) and (path.stem.endswith("_triton") or path.name in TRITON)
        assert allowed, f"{path.name} imports triton; only *_triton.py may"
    if not path.stem.endswith("_triton"):
        loaded = imports(path, at_load=True)
        bad = sorted(
            name for name in loaded if name.split(".")[-1].endswith("_triton") or name.split(".")[0] == "triton"
        )
        assert not bad, f"{path.name} loads {bad} when it is imported; Triton loads at the first call"


def test_rooms_of_the_engine_stand_on_floors() -> None:
    """Imports run down, in no circle, wherever they stand; `python -m tests.import_graph` draws the house."""
    rooms = import_graph.room_graph()
    assert set(rooms) <= set(import_graph.FLOORS), "a new room needs a floor: tests/import_graph.py"
    assert not import_graph.upward(rooms), "imports that run upward"
    assert not import_graph.circles(rooms), "rooms that import each other"
    assert not import_graph.circles(import_graph.module_graph()), "modules that import each other"
    assert max(import_graph.floors(rooms).values()) <= 10


def test_kernels_import_in_no_circle() -> None:
    known = {name_of(p): p for p in SOURCES if p.is_relative_to(KERNELS)}
    graph = {name: {i for i in imports(path) if i in known and i != name} for name, path in known.items()}
    faces = {name: {n for n in needs if not name.startswith(f"{n}.")} for name, needs in graph.items()}
    assert not import_graph.circles(faces)


def test_the_top_of_the_engine_holds_its_front_doors_alone() -> None:
    assert {p.name for p in ENGINE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "engine.py"}


@pytest.mark.parametrize(
    ("room", "barred"),
    [
        ("saving", "engine"),
        ("rollout", "recipe"),
        ("stages", "command"),
        *((room, "cli") for room in import_graph.FLOORS if room not in ("cli", "__main__")),
        *((room, "integrations") for room in import_graph.FLOORS if room != "integrations"),
    ],
)
def test_who_does_not_know_whom(room: str, barred: str) -> None:
    assert barred not in import_graph.room_graph().get(room, set())


def test_sampling_knows_no_scores() -> None:
    """Nothing of the rollout's wing is named after what judges its responses."""
    for path in sorted((ENGINE / "rollout").glob("*.py")):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None) or "" for n in tree}
        bad = sorted(n for n in names if any(word in n.lower() for word in ("reward", "critic", "advantage")))
        assert not bad, f"{path.name} names {bad}"


def test_the_recipe_never_asks_whether_it_is_sharded() -> None:
    """One process is the identity of sharding, so PPO-max reads the same on one rank and on many."""
    for path in sorted((ENGINE / "recipe").glob("*.py")):
        assert "torch.distributed" not in imports(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                asked = ast.unparse(node.test)
                bad = [w for w in ("world_size", "is_initialized", "rank()", "started_ranks") if w in asked]
                assert not bad, f"{path.name}:{node.lineno} asks {asked}"


def test_configuration_and_command_line_load_no_torch() -> None:
    """Every module of `config` and `command`, and the command line itself, as `--help` needs them."""
    rooms = ("config", "command", "cli")
    names = sorted(n for n in import_graph.modules() if import_graph.room_of(n) in rooms)
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "False", "torch is loaded"


# ---- sizes ----------------------------------------------------------------------------------------------------------

LIST_OF_KNOBS = ENGINE / "config" / "knobs.py"
LONG_FUNCTIONS = 4
"""So many functions may have more than 50 lines."""


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of engine and kernels, but device kernels, with the words that name it."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if not any("triton" in ast.unparse(d) for d in node.decorator_list):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring and decorators aside."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and node.end_lineno
    told = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - told


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls", "ctx")])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_longer_than_one_concern(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or path == LIST_OF_KNOBS, f"{path.name} has {lines} lines; open it up"


def test_functions_are_short() -> None:
    long = [f"{where}: {lines_of(node)} lines" for where, node in functions() if lines_of(node) > 50]
    assert len(long) <= LONG_FUNCTIONS, "\n".join(long)


def test_parameter_lists_are_short() -> None:
    """The engine's functions take at most 10, the kernels' private ones 12; public ops name all that they take, and
    what stands in for another trainer's function takes what that takes."""
    import ppomax_kernels

    public = {f"ppomax_kernels/{op}.py" for op in ppomax_kernels.__all__}
    bad = []
    for where, node in functions():
        limit = 10 if where.startswith("engine") else 12
        op = where.split(":")[0].removeprefix("kernels/") in public and node.name in ppomax_kernels.__all__
        if parameters_of(node) > limit and not op and "/integrations/" not in where:
            bad.append(f"{where}: {parameters_of(node)} parameters")
    assert not bad, "\n".join(bad)


def test_kernels_import_without_triton_and_the_engine() -> None:
    """`import ppomax_kernels` loads torch and nothing heavy."""
    code = f"import sys, ppomax_kernels; print(sorted({HEAVY | {'triton'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]", f"import ppomax_kernels loads {done.stdout.strip()}"


def test_no_package_named_kernels_or_engine() -> None:
    """A root package `kernels` would be taken by transformers for the PyPI package of that name."""
    for folder in ("kernels", "engine"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_csrc_knows_nothing_above_it() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            lines = path.read_text(encoding="utf-8").splitlines()
            bad = [
                x
                for x in lines
                if x.startswith("#include") and any(w in x for w in ("torch", "ATen", "c10", "Python.h"))
            ]
            assert not bad, f"{path.name}: {bad}"


def test_each_op_is_found_by_name() -> None:
    """Formula and public function, Triton kernels, oracle, test: by the op's name alone."""
    import ppomax_kernels as K

    tests = {p.name for p in (ROOT / "tests" / "kernels").glob("test_*.py")}
    for op in (n for n in K.__all__ if n[0].islower()):
        assert (KERNELS / f"{op}.py").exists()
        if not op.startswith("linear_"):  # GEMMs are torch's, row work is that of token_logprobs and ppo_loss
            assert (KERNELS / f"{op}_triton.py").exists(), f"{op}_triton.py is missing"
        assert f"test_{op}.py" in tests or (op.startswith("linear_") and "test_linear_ops.py" in tests)


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed; pip install -e '.[test]'")
    return found


def test_ruff() -> None:
    done = subprocess.run([tool("ruff"), "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_mypy() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
