"""The page "Custom scalars" of TensorBoard: confusion, loss and accuracy in one chart, and a band of the cosines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_gradconf.reports.loggers import BAND

Layout = dict[str, dict[str, list[str | list[str]]]]
# An event file begins with its version, which takes less than this; a page takes more.
_BYTES_OF_VERSION = 100


def charts(prefix: str) -> Layout:
    """Return the charts of one callback, in the form of ``SummaryWriter.add_custom_scalars``.

    Tags are regular expressions. TensorBoard joins them into one and matches from the start of a key, so a flag such as
    ``(?i)`` is not possible. Losses and accuracies are found by their names, even if they are first logged late in the
    run. Of a pair ``_step`` and ``_epoch``, the chart shows ``_step``.

    >>> charts("confusion")["confusion"]["min_cosine, loss, accuracy: see Matches"][1]
    ['confusion/([^/]+/)?min_cosine$', '(?!confusion/|.*_epoch$).*[lL]oss', '(?!confusion/|.*_epoch$).*[aA]cc']
    """
    ours = f"{re.escape(prefix)}/"
    named = [f"(?!{ours}|.*_epoch$).*{part}" for part in ("[lL]oss", "[aA]cc")]
    return {
        prefix: {
            "min_cosine, loss, accuracy: see Matches": ["Multiline", [f"{ours}([^/]+/)?min_cosine$", *named]],
            "cosines, 5 % to 95 %": ["Margin", [f"{prefix}/cosines/{name}" for name in BAND]],
        }
    }


def add_page(experiment: Any, prefixes: Iterable[str]) -> None:
    """Write the page of a run as the first thing in its event file, for the callbacks with these prefixes.

    TensorBoard shows the last page of a run, so that one written later by the user is shown instead. Where something
    is in the file already, it may be a page of the user's, and none is written.
    """
    page = {title: named for prefix in prefixes for title, named in charts(prefix).items()}
    if page and _is_empty(experiment):
        experiment.add_custom_scalars(page)


def _is_empty(experiment: Any) -> bool:
    """Return whether nothing was written to an event file; one that is not on this machine is taken to be new."""
    experiment.flush()
    files = Path(experiment.log_dir).glob("events.out.tfevents.*")
    newest = max((file.stat() for file in files), key=lambda stat: stat.st_mtime_ns, default=None)
    return newest is None or newest.st_size < _BYTES_OF_VERSION
