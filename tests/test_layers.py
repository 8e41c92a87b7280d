"""The house stands: imports run down (engine -> kernels -> csrc), in no circle; Triton only in *_triton files; style
and types are clean."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS, ENGINE = ROOT / "kernels" / "ppomax_kernels", ROOT / "engine" / "ppomax"
SOURCES = sorted([*KERNELS.rglob("*.py"), *ENGINE.rglob("*.py")])
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


def test_no_import_circle() -> None:
    known = {name_of(p): p for p in SOURCES}
    graph = {name: {i for i in imports(path, at_load=True) if i in known and i != name} for name, path in known.items()}
    for name, needs in graph.items():  # a package's __init__ imports its parts, and they may name the package
        parent = name.rsplit(".", 1)[0]
        needs.discard(parent)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


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
