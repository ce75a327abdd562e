"""The direction of imports: what each part of the package may know of the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_gradconf"
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
# Part of the package: the other parts that it imports. A part is a folder or a file of the root.
ALLOWED = {
    "batches": set(),
    "gram": {"batches"},
    "statistics": set(),
    "plots": {"reports", "statistics"},  # of reports saved_runs and settings only, see below
    "reports": {"batches", "plots", "statistics"},  # of batches units.Origin only, see below
    "metric": {"plots", "statistics"},
    "training": {"batches", "gram", "reports", "statistics"},  # gram and reports know nothing of it
    "callback": {"batches", "gram", "reports", "statistics", "training"},
    "__main__": {"plots", "reports"},
    "__init__": {"callback", "gram", "metric", "statistics"},
}
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path, types: bool = True) -> set[str]:
    """Return the full names of all modules that a file imports, in functions too, and for types if asked."""
    tree, names = ast.parse(file.read_text(encoding="utf-8")), set()
    if not types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= modules if node.module == "lightning_gradconf" else {node.module or ""}
    return names


def parts(file: Path) -> set[str]:
    """Return the parts of the package that a file imports."""
    return {name.split(".")[1] for name in imported(file, types=False) if name.startswith("lightning_gradconf.")}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    own = name.split("/")[0].removesuffix(".py")
    assert parts(FILES[name]) <= ALLOWED[own] | {own}


def test_statistics_need_torch_only():
    roots = {name.split(".")[0] for name in imported(FILES["statistics.py"])}
    assert roots <= {"torch", *sys.stdlib_module_names}


def test_figures_know_saved_curves_and_reports_know_where_a_unit_is_from():
    def of(part: str, file: Path) -> set[str]:
        return {name for name in imported(file) if name.startswith(f"lightning_gradconf.{part}")}

    assert {name.split(".")[2] for name in of("reports", FILES["plots.py"])} <= {"saved_runs", "settings"}
    for name, file in FILES.items():
        if name.startswith("reports/"):
            assert of("batches", file) <= {"lightning_gradconf.batches.units"}


@pytest.mark.parametrize("name", FILES)
def test_lightning_is_known_to_the_callback_and_training_only(name):
    if name != "callback.py" and not name.startswith("training/"):
        assert not LIGHTNING & {module.split(".")[0] for module in imported(FILES[name], types=False)}


def test_everything_but_the_callback_works_without_lightning():
    program = f"""
import sys
for name in {sorted(LIGHTNING)}:
    sys.modules[name] = None  # an import of it fails
import torch
from lightning_gradconf import GradientConfusion, gradient_gram, gradient_statistics
import lightning_gradconf.__main__, lightning_gradconf.plots

module = torch.nn.Linear(3, 1)
grams = gradient_gram(module, lambda module, x: module(x).square().mean(), torch.randn(4, 3))
assert set(gradient_statistics(sum(grams.values()))) == set(GradientConfusion().names)
try:
    from lightning_gradconf import GradientConfusionCallback
except ImportError as error:
    print(error)
else:
    raise SystemExit("the callback was imported without Lightning")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "lightning" in done.stdout.lower()
