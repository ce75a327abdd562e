"""Break each part of the isolation in turn and see that a scenario notices.

    python tests/broken_isolation.py [-n PROCESSES] [-k EXPRESSION]

For each part a copy of the package is made in which that part is missing, and tests/test_no_trace.py runs against it
until its first failure, whose name is printed. Exits with 1 if a break goes unnoticed. Takes a few minutes, so the test
suite does not run it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")
# Imported once, and inherited by a process for each break.
IMPORTS = ("lightning.pytorch", "pytorch_lightning", "torch._dynamo", "torch.utils.tensorboard", "torchmetrics")
# The quick ones first.
TESTS = (
    "test_no_trace.py::test_refused_with_one_warning",
    "test_no_trace.py::test_warnings_and_prints_of_the_step_appear_as_often_as_without",
    "test_no_trace.py::test_cosines_under_mixed_precision_are_close_to_those_in_float32",
    "test_no_trace.py::test_run_is_bitwise_the_run_without",
    "training/test_silence.py",
    "test_faults.py",
)
SELECTION = "not (epochs or fixed or batches)"  # the other ways of taking units are enough to notice

ISOLATION, PROCESS, RESTORING, NO_TRACE, MEASURE, STEP, MANUAL, OBJECTIVE, VMAP, UNITS, SESSION, LAYERS = (
    "gram/module_state.py",
    "gram/process_state.py",
    "gram/restoring.py",
    "training/isolation.py",
    "training/measure.py",
    "training/training_step.py",
    "training/manual_optimization.py",
    "gram/objective.py",
    "gram/vmap.py",
    "batches/structure.py",
    "training/session.py",
    "gram/measurement_mode.py",
)
# part: file, what the file says, what it says when broken.
BREAKS: dict[str, tuple[str, str, str]] = {
    "Python's random state": (PROCESS, "(random.setstate, random.getstate()), ", ""),
    "NumPy's random state": (PROCESS, "(np.random.set_state, np.random.get_state()), ", ""),
    "torch's random state": (PROCESS, "[(torch.set_rng_state, torch.get_rng_state())]", "[]"),
    "gradients": (RESTORING, "    if tensor.grad is not grad:", "    if False:"),
    "requires_grad": (RESTORING, "    if tensor.requires_grad != requires_grad:", "    if False:"),
    "tensors of the module under its own hooks": (ISOLATION, "        if tensors:", "        if False:"),
    "tensors in Python state": (
        RESTORING,
        "    if tensor.shape != saved.shape:",
        "    if True:\n        return False\n    elif 0:",
    ),
    "gradients of tensors in Python state": (ISOLATION, "self._follow(tensor.grad, path)", "pass"),
    "hidden modules": (ISOLATION, "if id(module) in self._swapped else ()", ""),
    "entries of mappings": (ISOLATION, "if type(key) not in _ATOMS or key not in _NOT_FOLLOWED:", "if False:"),
    "mappings": (RESTORING, "    if is_same(mapping, saved):", "    if True or is_same(mapping, saved):"),
    "order and size of mappings": (RESTORING, "        mapping.clear()", "        pass"),
    "a Counter": (RESTORING, "        mapping[key] = value", "        mapping.update([(key, value)])"),
    "lists": (RESTORING, "    if not _same(sequence, saved):", "    if False:"),
    "deques": (ISOLATION, "if isinstance(value, list | deque):", "if isinstance(value, list):"),
    "sets": (ISOLATION, "self.containers.append(partial(restore_set, value, set(value)))", "pass"),
    "tuples and lists inside": (ISOLATION, "            if type(entry) not in _ATOMS:", "            if False:"),
    "arrays": (RESTORING, "        array[...] = saved", "        pass"),
    "torch generators": (ISOLATION, "    if isinstance(value, torch.Generator):", "    if False:"),
    "Python generators": (ISOLATION, "    elif isinstance(value, random.Random):", "    elif False:"),
    "NumPy generators": (ISOLATION, "isinstance(value, np.random.Generator)", "False"),
    "iterators": (ISOLATION, "        elif isinstance(value, Iterator):", "        elif False:"),
    "objects of the user's": (ISOLATION, "elif self._is_users(value):", "elif False:"),
    "objects from other files": (ISOLATION, "or not _is_installed(module)", ""),
    "namespaces": (ISOLATION, "isinstance(value, SimpleNamespace | Namespace)", "False"),
    "attributes of data": (ISOLATION, "vars(value), dict(vars(value)))", "{}, {})"),
    "generators of data": (
        ISOLATION,
        "                self._remember_data(entry, is_item=are_items)\n\n    def _is",
        "                pass\n\n    def _is",
    ),
    "transforms of data": (
        ISOLATION,
        "            for entry in islice(entries, _MOST_TRANSFORMS):",
        "            for entry in ():",
    ),
    "transforms of libraries": (
        ISOLATION,
        "isinstance(value, Dataset | Sampler) or callable(value) or",
        "isinstance(value, Dataset) or",
    ),
    "log is mute": (NO_TRACE, 'vars(part)["log"] = ', ""),
    "print is mute": (NO_TRACE, ' = vars(part)["print"]', ""),
    "loggers are dummies": (NO_TRACE, "trainer.loggers = [silent(logger) for logger in trainer.loggers]", "pass"),
    "attributes of the Trainer": (NO_TRACE, "data += [trainer, loop,", "data += [loop,"),
    "optimizers' groups": (NO_TRACE, "*groups, ", ""),
    "schedulers": (NO_TRACE, "*schedulers, ", ""),
    "the loader's state": (NO_TRACE, "*containers, data", "data"),
    "the data module": (NO_TRACE, "data=data, ", ""),
    "Python's logging": (NO_TRACE, "stack.enter_context(without_logging())", "pass"),
    "warnings": (NO_TRACE, "stack.enter_context(without_warnings())", "pass"),
    "what torch warns of once": (NO_TRACE, "torch.set_warn_always(True)", "pass"),
    "filters of warnings": (PROCESS, "        filters[:] = saved", "        pass"),
    "compiled code runs eagerly": (NO_TRACE, 'torch.compiler.set_stance("force_eager")', "ExitStack()"),
    "the module's own hook": (MEASURE, 'if not is_overridden(module, "on_train_batch_start"):', "if True:"),
    "the precision plugin's context": (STEP, "trainer.precision_plugin.train_step_context()", "ExitStack()"),
    "steps of optimizers": (MANUAL, 'vars(optimizer)["step"] = partial(self._step, i)', "pass"),
    "other methods of optimizers": (MANUAL, "vars(optimizer)[name] = do_nothing", "pass"),
    "what stands in for methods of optimizers": (
        MANUAL,
        "stack.callback(restore_mapping, vars(optimizer),",
        "0 and (0,",
    ),
    "gradient scalers": (MANUAL, "vars(scaler).update(unscale_=do_nothing, update=do_nothing)", "pass"),
    "schedulers stepped by hand": (MANUAL, 'vars(scheduler)["step"] = do_nothing', "pass"),
    "backward passes": (MANUAL, "if func is Tensor.backward:", "if False:"),
    "gradients changed by hand": (NO_TRACE, "tensors = not module.automatic_optimization or any(", "tensors = any("),
    "copies of batches": (UNITS, "map_leaves(lambda leaf: leaf.clone() if", "map_leaves(lambda leaf: leaf if"),
    "copies of parameters": (
        OBJECTIVE,
        "name: p.detach().clone().requires_grad_() for",
        "name: p.detach().requires_grad_() for",
    ),
    "copies of buffers": (
        OBJECTIVE,
        "{name: t.detach().clone() for name, t in self.const",
        "{name: t for name, t in self.const",
    ),
    "BatchNorm leaves its buffers": (LAYERS, "        if func is F.batch_norm:", "        if False:"),
    "errors never reach the training": (
        SESSION,
        "        except Exception as error:\n            if self._failures",
        "        except ZeroDivisionError as error:\n            if self._failures",
    ),
}


def broken(part: str) -> str | None:
    """Return the first test that fails without this part of the isolation."""
    file, old, new = BREAKS[part] if part else (ISOLATION, "", "")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        shutil.copytree(ROOT / "lightning_gradconf", copy / "lightning_gradconf")
        shutil.copytree(ROOT / "tests", copy / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / "lightning_gradconf" / file
        text = source.read_text(encoding="utf-8")
        if part and old not in text:
            raise SystemExit(f"{part}: {file} does not say {old!r} any more; update tests/broken_isolation.py")
        source.write_text(text.replace(old, new) if part else text, encoding="utf-8")
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        import pytest

        output = io.StringIO()
        tests = [str(copy / "tests" / name) for name in TESTS]
        flags = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "--basetemp", str(copy / "tmp")]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = pytest.main([*flags, "-k", SELECTION, *tests])
        failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - .*)?$", output.getvalue(), re.MULTILINE)
        if code not in (0, 1) or (code == 1 and failed is None):
            raise SystemExit(f"{part}: the tests could not be run\n{output.getvalue()}")
        os.chdir(ROOT)
        return failed and failed[1]


def in_a_process(part: str) -> tuple[str | None, float]:
    """Run `broken` in a process that may have children, as data loaders do, and inherits what was imported."""
    start = time.perf_counter()
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sending.send(broken(part)))
    process.start()
    sending.close()
    try:
        return receiving.recv(), time.perf_counter() - start
    finally:
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=2, help="processes")
    parser.add_argument("-k", default="", help="only the parts whose names this expression is found in")
    options = parser.parse_args()
    for name in IMPORTS:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    parts = [*(part for part in BREAKS if re.search(options.k, part)), ""]
    unnoticed = []
    with ThreadPoolExecutor(options.n) as pool:
        for part, (test, seconds) in zip(parts, pool.map(in_a_process, parts), strict=True):
            expected = test is None if part == "" else test is not None
            print(f"{part or '(nothing broken)':50} {seconds:5.0f} s  {test or 'unnoticed'}", flush=True)
            if not expected:
                unnoticed.append(part)
    print(f"{len(parts) - 1} parts, {len(unnoticed)} unnoticed: {', '.join(unnoticed) or 'none'}")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
