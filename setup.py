"""Package metadata; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "lightning_gradconf" / "__init__.py").read_text(encoding="utf-8")
REPOSITORY = "https://github.com/lightning-gradconf/lightning-gradconf"
# PyPI shows README.md without the repository around it.
README = re.sub(
    r"(\]\(|src=\")(?!https?:|#)([^)\"]+)",
    lambda link: f"{link[1]}{REPOSITORY}/{'raw' if link[2].endswith('.png') else 'blob'}/main/{link[2]}",
    (ROOT / "README.md").read_text(encoding="utf-8"),
)
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1)

PLOTS = ["matplotlib>=3.9", "scipy>=1.13"]  # the first built for NumPy 2, which torch 2.6 may bring
SKLEARN = ["scikit-learn>=1.4.2"]  # 1.4.2: the first built for NumPy 2
CLI = ["jsonargparse[signatures]>=4.27.7"]  # what pytorch-lightning 2.4 asks for its LightningCLI
TRANSFORMERS = ["transformers>=4.48"]
# mkdocs 1.6 validates anchors; latex2mathml: formulas that need no script to show; ruff breaks long signatures.
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0", "latex2mathml>=3.77", "ruff>=0.9"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "pytest-cov>=5", "hypothesis>=6.100", "build>=1.2"]
LINT = ["ruff>=0.9", "mypy>=1.14", "codespell>=2.4"]  # ruff 0.9: the 2025 formatting style
# not backpack, which asks for torchvision and with it another torch
PEERS = ["torchjd>=0.18", "opacus>=1.6", "traintools>=0.6"]
TESTED_WITH = ["lightning>=2.4,!=2.6.2,!=2.6.3", "rich>=13", "hydra-core>=1.3"]
LOGGERS = ["mlflow-skinny>=2.20", "wandb>=0.19"]  # the lowest that know NumPy 2
# Packages whose own modules are trained and measured by tests/test_ecosystem.py; the versions it was first run with.
ECOSYSTEM = ["torch_geometric>=2.8", "pytorch-forecasting>=1.8", 'chemprop>=2.3; python_version >= "3.11"']
BROWSER = ["selenium>=4.20"]  # looks at the pages of TensorBoard

setup(
    name="lightning-gradconf",
    version=VERSION,
    description="Gradient confusion in PyTorch Lightning: a callback, a metric and the functions behind them",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The lightning_gradconf contributors",
    url=REPOSITORY,
    project_urls={
        "Documentation": "https://lightning-gradconf.github.io/lightning-gradconf/",
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["deep learning", "pytorch", "lightning", "gradient confusion", "per-sample gradients", "tensorboard"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["lightning_gradconf", "lightning_gradconf.*"]),
    package_data={"lightning_gradconf": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",  # torch.compiler.set_stance
        "pytorch-lightning>=2.4,!=2.6.2,!=2.6.3",  # 2.4: the first tested with torch 2.6; 2.6.2, 2.6.3: compromised
        "torchmetrics>=1.0",  # Metric.plot
        "tensorboard>=2.17",  # 2.16 fails with NumPy 2 (np.string_)
        "numpy",  # whichever torchmetrics and TensorBoard ask for
    ],
    extras_require={
        "plots": PLOTS,
        "examples": PLOTS + SKLEARN + CLI + TRANSFORMERS,  # whatever a file of examples/ imports
        "cli": CLI,
        "bench": PEERS,
        "docs": DOCS,
        "ecosystem": ECOSYSTEM,
        "test": TEST + LINT + TESTED_WITH + LOGGERS + BROWSER + PLOTS + SKLEARN + CLI + TRANSFORMERS,
    },
)
