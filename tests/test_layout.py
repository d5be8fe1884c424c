"""The house: which floor may import which, what an import may cost, how long a file may be."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "parallel": {"parallel", "model"},
    "compress": {"compress", "model"},
    "train": {"train", "model", "parallel"},
    "experiments": {"experiments", "model", "train", "parallel", "compress"},
}
HEAVY = (
    "orbax",
    "grain",
    "sentencepiece",
    "tensorflow",
    "tensorflow_datasets",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "matplotlib",
    "pyarrow",
    "gguf",
    "onnx",
    "onnxruntime",
    "ray",
    "sklearn",
    "sacrebleu",
    "dp_accounting",
    "datasketch",
    "py3langid",
    "bm25s",
    "lm_eval",
    "datasets",
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_point_down(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        ours = {name.split(".")[0] for name in imports(path)} & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], path


def test_no_imports_run_in_a_circle():
    """Those inside functions count too."""
    files = {path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    graph = {}
    for name, path in names.items():
        froms = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        inner = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        graph[name] = ({*imports(path)} | inner) & set(names)
    assert any(graph.values())
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names it


def test_imports_bring_nothing_heavy():
    """Every module of the packages, and the packages as a notebook imports them."""
    for packages in (tuple(MAY_IMPORT), ("model", "train", "parallel", "compress")):
        modules = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for package in packages
            for path in sorted((ROOT / package).rglob("*.py"))
            if path.name != "__init__.py"
        ]
        code = (
            "import sys, importlib\n"
            f"[importlib.import_module(name) for name in {[*packages, *modules]}]\n"
            f"print([name for name in {HEAVY} if name in sys.modules])"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "[]"


def test_files_hold_one_concept():
    """A file over 400 lines is asking to be two (tests may hold many small properties)."""
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
