"""Run the cells of a notebook as a script, without Jupyter, and keep what they show.

    python tests/notebook.py examples/tour.ipynb

runs it and writes its outputs, pictures among them, into the file.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def run(path: Path) -> dict[str, Any]:
    """Return the notebook with the outputs that its code cells have when they are run one after another."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        # A line such as %matplotlib inline is Jupyter's.
        source = "".join("\n" if line.startswith("%") else line for line in cell["source"])
        printed = io.StringIO()
        with redirect_stdout(printed):
            value = _execute(source, f"{path.name}, cell {number}", namespace)
        outputs = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}]
        cell["outputs"] = [*(outputs if printed.getvalue() else []), *_shown(value, number)]
        cell["execution_count"] = number
    return notebook


def _execute(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Return the value of the last line, None if it is no expression."""
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(last, name, "eval"), namespace)


def _shown(value: Any, number: int) -> list[dict[str, Any]]:
    if value is None:
        return []
    data = {"text/plain": [repr(value)]}
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=80)
        data["image/png"] = base64.b64encode(picture.getvalue()).decode()
    return [{"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = run(Path(name))
        Path(name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
