"""What the measurements of a run compared, logged beside its curves: a minimum over pairs means little without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Settings(NamedTuple):
    """What one run compared at each measurement.

    Attributes:
        n: Gradients compared, rows of the Gram.
        unit_size: Samples behind each gradient, None where they cannot be counted.
        engine: The engine that computed the Gram.
    """

    n: int
    unit_size: int | None
    engine: str

    def __str__(self) -> str:
        """Return the settings as a legend shows them."""
        size = "?" if self.unit_size is None else self.unit_size
        return f"n = {self.n}, unit_size = {size}, {self.engine}"


def row_of(settings: Settings) -> dict[str, str]:
    """Return settings as the row of the table ``{prefix}/settings``, from which ``read_settings`` reads them back.

    >>> row_of(Settings(15, None, "ghost"))
    {'n': '15', 'unit_size': '', 'engine': 'ghost'}
    """
    return {name: "" if value is None else str(value) for name, value in settings._asdict().items()}


def settings_from(row: dict[str, str]) -> Settings:
    """Return the settings that a row of the logged table holds.

    >>> settings_from({"n": "15", "unit_size": "128", "engine": "ghost"})
    Settings(n=15, unit_size=128, engine='ghost')
    """
    return Settings(int(row["n"]), int(row["unit_size"]) if row["unit_size"] else None, row["engine"])


def why_not_comparable(settings: Iterable[Settings]) -> str:
    """Return what forbids comparing runs with these settings; empty if nothing does.

    >>> why_not_comparable([Settings(15, 128, "ghost"), Settings(100, 128, "loop")])
    'n differs (15, 100), and a minimum over more pairs is lower: compare p05_cosine, not min_cosine or eta'
    >>> why_not_comparable([Settings(15, 1, "ghost"), Settings(15, 128, "ghost")])
    'unit_size differs (1, 128), and larger units agree more: compare none of these values'
    """
    chosen = list(settings)
    sizes = sorted({setting.unit_size for setting in chosen if setting.unit_size is not None})
    if len(sizes) > 1:
        found = ", ".join(map(str, sizes))
        return f"unit_size differs ({found}), and larger units agree more: compare none of these values"
    numbers = sorted({setting.n for setting in chosen})
    if len(numbers) > 1:
        found = ", ".join(map(str, numbers))
        return f"n differs ({found}), and a minimum over more pairs is lower: compare p05_cosine, not min_cosine or eta"
    return ""
