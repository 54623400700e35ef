"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def counted(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "image"), counted(1500, "image"), counted(2, "class", "classes")
    ('1 image', '1,500 images', '2 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1.

    >>> percent(0.9973), percent(None)
    ('99.7%', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def data_size(num_bytes: float) -> str:
    """Decimal units, as networks and disks are sold.

    >>> data_size(0), data_size(999), data_size(246_912), data_size(7_370_472)
    ('0 bytes', '999 bytes', '246.9 kB', '7.4 MB')
    """
    if num_bytes < 1000:
        return counted(int(num_bytes), "byte")
    unit = next((unit for unit in ("kB", "MB") if num_bytes < 999.95 * _UNITS[unit]), "GB")
    return f"{num_bytes / _UNITS[unit]:,.1f} {unit}"


def duration(seconds: float) -> str:
    """A time in the units that fit it.

    >>> duration(0.0032), duration(0.91), duration(58.4), duration(716.2), duration(7260)
    ('0.0032 s', '0.9 s', '58 s', '11 min 56 s', '2 h 1 min')
    """
    if seconds < 0.1:
        return f"{seconds:.2g} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float | None, digits: int = 3) -> str:
    """A measure without a unit.

    >>> number(0.53761), number(1234.5), number(12), number(None)
    ('0.538', '1,234', '12', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a row, the first few of many.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"
