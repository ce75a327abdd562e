"""Run tests/test_lightning.py where only one of Lightning's two packages is installed, and where both are.

    python tests/three_environments.py [FOLDER]

Builds one virtual environment from constraints.txt in FOLDER (by default a temporary one) and takes it through three
states: both packages, only `pytorch-lightning`, only `lightning`. The last cannot be had from pip, since `lightning`
requires `pytorch-lightning`, but by removing that afterwards. Exits with 1 if a test fails in one of them.

Takes some minutes, most of them for torch, so continuous integration runs only the state with both, as `make test`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Which packages to install, which to remove, what is left.
STATES = [
    ([], [], {"lightning", "pytorch_lightning"}),
    ([], ["lightning"], {"pytorch_lightning"}),
    (["lightning"], ["pytorch-lightning"], {"lightning"}),
]
LEFT = "from importlib.util import find_spec; print(*filter(find_spec, ('lightning', 'pytorch_lightning')))"


def main(folder: Path) -> int:
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    install = [*pip, "install", "-c", str(ROOT / "constraints.txt")]
    run([*install, "setuptools", "torch"])  # alone: no other requirement can bring another build of it
    run([*install, "--no-build-isolation", "-e", f"{ROOT}[test]"])
    failed = False
    for add, remove, left in STATES:
        if add:
            run([*install, "--no-deps", *add])
        if remove:
            run([*pip, "uninstall", "-y", *remove])
        found = set(subprocess.run([python, "-c", LEFT], capture_output=True, text=True, check=True).stdout.split())
        assert found == left, f"found {found} instead of {left}"
        print(f"--- {' and '.join(sorted(left))}", flush=True)
        tests = [str(ROOT / "tests" / "test_lightning.py"), "-q", "-p", "no:cacheprovider"]
        failed |= subprocess.run([python, "-m", "pytest", *tests], cwd=folder).returncode != 0
    return int(failed)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).absolute()))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))
