"""Every example runs, by the one command that it documents, with what the extra [examples] installs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from notebook import run

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Where an example is a folder, its main file.
FILES = {path.stem: path for path in EXAMPLES.glob("*.py")} | {
    path.parent.name: path for path in EXAMPLES.glob("*/__main__.py")
}
# What setup.py names, by the name under which it is imported, where these differ.
IMPORTED_AS = {"scikit-learn": "sklearn", "pytorch-lightning": "pytorch_lightning"}


def imports(path: Path) -> set[str]:
    """The packages that a file imports, but for the standard library and what lies beside it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    beside = {file.stem for file in path.parent.glob("*.py")} | {path.parent.name, "lightning_gradconf"}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - beside


def requirements(extra: str) -> set[str]:
    """The names under which what setup.py asks for, with an extra, is imported."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    needed = eval(given["install_requires"]) + eval(given["extras_require"], dict(lists))[extra]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}
    return {IMPORTED_AS.get(name, name) for name in names}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_extra_installs_what_an_example_imports(path):
    assert imports(path) <= requirements("examples") | {"numpy", "tqdm"}  # which these bring


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"paper"}))  # which has tests of its own
def test_documents_its_command(name):
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    target = "make demo" if name == "digits" else f"make example NAME={name}"
    assert re.search(rf"^ *{target}\b", text or "", re.MULTILINE)
    done = subprocess.run(["make", "-n", *target.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert re.search(rf"examples/{name}\b", done.stdout)


def test_the_notebook_is_a_notebook_with_pictures():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["cells"][0]["cell_type"]) == (4, "markdown")
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the notebook filters those that a reader would see
def test_the_notebook_runs_and_says_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, kept = run(EXAMPLES / "tour.ipynb"), json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in found["cells"]] == [cell["source"] for cell in kept["cells"]]
    for now, then in zip(found["cells"], kept["cells"], strict=True):
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (now, then)]
        assert kinds[0] == kinds[1]
    texts = [
        "".join(cell["outputs"][0]["text"]) for cell in found["cells"] if "text" in (cell.get("outputs") or [{}])[0]
    ]
    suspects, accuracies = int(re.match(r"\d+", texts[1])[0]), [float(a) for a in re.findall(r"0\.\d+", texts[2])]
    assert suspects > 50  # per cent, where 10 are by chance
    assert accuracies[1] > accuracies[0] + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"paper"}))
def test_runs(name, tmp_path):
    path = FILES[name].parent if FILES[name].name == "__main__.py" else FILES[name]
    arguments = ["--fast"]
    if name == "cli":
        arguments = ["fit", "--config", str(EXAMPLES / "cli.yaml"), "--trainer.max_epochs=1"]
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_typical_values_are_a_table(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "typical.py"),
        "mlp",
        "gan",
        "graph",
        "contrastive",
        "--steps",
        "4",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == [
        *("MLP, digits", "GAN, digits, discriminator", "GAN, digits, generator"),
        *("graph network, digits", "contrastive, digits"),
    ]
    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    for row in rows:
        assert len(row) == 9
        assert row[0] in page
        assert all(cell.count("<br>") == 2 for cell in row[3:]) or row in rows[:2]
