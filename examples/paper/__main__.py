"""All studies, or those named: trains what is not yet trained, then writes tables and figures.

    PYTHONPATH=examples python -m paper [init] [width] [depth_width] [batchnorm_skip] [orthogonal] [speed] [theory]

Each finished run is a file under SAVE_DIR/NAME/runs; stop it when you like, and it goes on from there. To train anew,
remove the folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from . import batchnorm_skip, data, depth_width, init, orthogonal, speed, sweep, theory, width
from .protocol import DIGITS, FULL, on, shrunk
from .run import processor

STUDIES = {
    "init": init,
    "width": width,
    "depth_width": depth_width,
    "batchnorm_skip": batchnorm_skip,
    "orthogonal": orthogonal,
    "speed": speed,
    "theory": theory,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all by default")
    parser.add_argument("--full", action="store_true", help="the paper's own setting, on CIFAR-10; for a GPU and days")
    parser.add_argument("--fast", action="store_true", help="an epoch of tiny networks, to see that everything works")
    parser.add_argument("--data", choices=data.NAMES, help="default: digits-noisy, with --full cifar10")
    parser.add_argument("--data-dir", help="folder of the files of MNIST or CIFAR")
    parser.add_argument("--save-dir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--workers", type=int, help="runs at a time; default: one for each core, or one on a GPU")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.studies if name not in STUDIES]:
        parser.error(f"there is no study {', '.join(unknown)}: choose from {', '.join(STUDIES)}")
    protocol = FULL if args.full else DIGITS
    protocol = on(protocol, args.data or protocol.data)
    if args.fast:
        protocol = shrunk(protocol)
    try:
        data.load(protocol.data, args.data_dir)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    folder = args.save_dir / (protocol.data + ("-full" if args.full else "") + ("-fast" if args.fast else ""))
    workers = args.workers or (1 if torch.cuda.is_available() else os.cpu_count())
    print(f"Training on {processor()}, {workers} at a time.")
    summary = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        finish = partial(sweep.finish, folder=folder / "runs", data_dir=args.data_dir, pool=pool)
        for name in args.studies or STUDIES:
            summary.append(f"## {name}\n\n{STUDIES[name].study(protocol, finish, folder)}\n")
    (folder / "summary.md").write_text("\n".join(summary))
    print("\n" + "\n".join(summary))
    seconds = [json.loads(path.read_text())["cpu_seconds"] for path in (folder / "runs").glob("*.json")]
    print(
        f"{len(seconds)} runs took {sum(seconds) / 60:.1f} minutes of one core. Figures and CSV files are in {folder}."
    )


if __name__ == "__main__":
    main()
