"""At home in both namespaces of Lightning, in LightningCLI, and absent where Lightning is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import yaml

from lightning_gradconf import GradientConfusionCallback

# Lightning 2.6 calls jsonargparse in a way that its newest release deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
# tests/three_environments.py runs this file where only one of them is installed.
NAMESPACES = [name for name in ("pytorch_lightning", "lightning.pytorch") if find_spec(name.partition(".")[0])]
CLASS = "lightning_gradconf.GradientConfusionCallback"
OPTIONS = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(params=NAMESPACES)
def lightning(request):
    return import_module(request.param)


@pytest.fixture(autouse=True)
def no_flags_of_pytest(monkeypatch):
    """LightningCLI warns about arguments of the process beside its own."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


@pytest.fixture
def boring(lightning):
    """The namespace's own demo, with batches of four."""
    demos = import_module(f"{lightning.__name__}.demos.boring_classes")
    data = import_module("torch.utils.data")

    class Boring(demos.BoringModel):
        def train_dataloader(self):
            return data.DataLoader(demos.RandomDataset(32, 16), batch_size=4)

        validation_step = val_dataloader = None

    return Boring


@pytest.mark.parametrize("single", [False, True])
def test_trainer_takes_it_in_a_list_and_alone(lightning, boring, single):
    confusion = GradientConfusionCallback()
    assert isinstance(confusion, lightning.Callback)
    callbacks = confusion if single else [confusion]
    trainer = lightning.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", log_every_n_steps=1, **OPTIONS)
    trainer.fit(boring())
    assert confusion.last_step == 3
    assert "gradient_confusion/eta" in trainer.callback_metrics


def test_two_with_their_own_prefixes(lightning, boring, tmp_path):
    callbacks = [GradientConfusionCallback(prefix=prefix) for prefix in ("a", "b")]
    trainer = lightning.Trainer(max_steps=1, callbacks=callbacks, accelerator="cpu", log_every_n_steps=1, **OPTIONS)
    trainer.fit(boring())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert {"a/eta", "b/eta"} <= set(trainer.callback_metrics)


def test_misuse_is_the_namespaces_own_exception(lightning):
    exceptions = import_module(f"{lightning.__name__}.utilities.exceptions")
    with pytest.raises(exceptions.MisconfigurationException):
        GradientConfusionCallback(every_n_train_steps=1, every_n_epochs=1)


def run_cli(lightning, boring, *args, run=True):
    cli = import_module(f"{lightning.__name__}.cli")
    defaults = OPTIONS | {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1}
    options = {"trainer_defaults": defaults, "save_config_callback": None, "seed_everything_default": 1, "run": run}
    return cli.LightningCLI(boring, args=list(args), **options)


def confusions(cli):
    return [c for c in cli.trainer.callbacks if isinstance(c, GradientConfusionCallback)]


def test_command_line_flags(lightning, boring):
    flags = [
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.unit_size=batch",
        "--trainer.callbacks.num_units=2",
    ]
    cli = run_cli(lightning, boring, "fit", f"--trainer.callbacks+={CLASS}", *flags)
    (confusion,) = confusions(cli)
    assert (confusion.every_n_train_steps, confusion.unit_size, confusion.last_step) == (2, "batch", 1)


def classes(batch):
    return batch.argmax(1)


def loss(module, batch):
    return module.layer(batch).sum()


@pytest.mark.parametrize(
    ("option", "attribute", "value"),
    [
        ("labels=1", "labels", 1),
        ("labels=label", "labels", "label"),
        ("labels=test_lightning.classes", "labels", classes),
        ("loss_fn=test_lightning.loss", "loss_fn", loss),
        ("per_layer=1", "per_layer", 1),
        ("per_layer=true", "per_layer", True),
        ("unit_size=2", "unit_size", 2),
        ("memory_budget=2GB", "memory_budget", "2GB"),
        ("memory_budget=1000000000", "memory_budget", 10**9),
        ("parameters=layer.*", "parameters", "layer.*"),
        ("statistics=[eta,seconds]", "statistics", ("eta", "seconds")),
        ("max_overhead=null", "max_overhead", None),
    ],
)
def test_what_arrives_from_the_command_line(option, attribute, value, lightning, boring):
    flags = [f"--trainer.callbacks+={CLASS}", f"--trainer.callbacks.{option}"]
    (confusion,) = confusions(run_cli(lightning, boring, *flags, run=False))
    found = getattr(confusion, attribute)
    if callable(value):
        assert found.__name__ == value.__name__ and found.__module__ == "test_lightning"
    else:
        assert found == value and type(found) is type(value)


def test_printed_config_has_every_argument_and_reads_back(lightning, boring, tmp_path, capsys):
    given = {
        "every_n_train_steps": 3, "every_n_epochs": None, "max_overhead": 0.1, "num_units": 5, "unit_size": 1,
        "source": "fresh", "engine": "loop", "memory_budget": "1GB", "parameters": ["layer.*"],
        "loss_fn": "test_lightning.loss", "dropout": True, "statistics": ["eta"], "per_layer": 1, "histogram": False,
        "figures": True, "top_pairs": 2, "labels": 1, "prefix": "a", "prog_bar": True, "seed": 3, "verify": True,
    }  # fmt: skip
    assert list(given) == [p for p in inspect.signature(GradientConfusionCallback.__init__).parameters if p != "self"]
    config = {"trainer": {"callbacks": [{"class_path": CLASS, "init_args": given}]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        run_cli(lightning, boring, f"--config={tmp_path}/config.yaml", "--print_config", run=False)
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"] == given
    (tmp_path / "printed.yaml").write_text(printed)
    (confusion,) = confusions(run_cli(lightning, boring, f"--config={tmp_path}/printed.yaml", run=False))
    assert confusion.max_overhead == 0.1 and confusion.loss_fn.__name__ == "loss"


def test_yaml_and_printed_config_round_trip(lightning, boring, tmp_path, capsys):
    given = {"trainer": {"callbacks": [{"class_path": CLASS, "init_args": {"num_units": 3, "statistics": ["eta"]}}]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(SystemExit):
        run_cli(lightning, boring, "fit", f"--config={tmp_path}/config.yaml", "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    options = yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]
    assert options["num_units"] == 3 and options["seed"] == 0
    (confusion,) = confusions(run_cli(lightning, boring, "fit", f"--config={tmp_path}/printed.yaml"))
    assert set(confusion.last_statistics) == {"eta"}


def test_bad_values_are_refused_on_the_command_line(lightning, boring, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(lightning, boring, "fit", f"--trainer.callbacks+={CLASS}", "--trainer.callbacks.source=nowhere")
    assert stop.value.code == 2
    assert "source" in capsys.readouterr().err


def test_help_comes_from_the_docstring(lightning, boring, capsys):
    with pytest.raises(SystemExit):
        run_cli(lightning, boring, "fit", f"--trainer.callbacks.help={CLASS}")
    assert "How many gradients are compared" in capsys.readouterr().out


WITHOUT = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
    sys.modules[name] = None
import torch, lightning_gradconf as lg
grams = lg.gradient_gram(torch.nn.Linear(2, 1), lambda m, x: m(x).sum(), torch.randn(4, 2))
assert set(lg.gradient_statistics(sum(grams.values()))) and lg.GradientConfusion
try:
    lg.GradientConfusionCallback
except ImportError as error:
    print("refused:", error)
"""


def test_everything_but_the_callback_works_without_lightning():
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "pip install pytorch-lightning" in done.stdout


def test_importing_the_package_does_not_import_lightning():
    code = "import sys, lightning_gradconf; assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
