"""What a section of the report is made of; `page.html.jinja` lays each kind out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Fact:
    """One line of a list of facts: a name, its value, and what the value means.

    ``simulated`` marks what only a simulation can know, here and below.
    """

    name: str
    value: str
    note: str = ""
    simulated: bool = False


@dataclass(frozen=True)
class Facts:
    """Facts, one below the other, under a heading of their own or none."""

    kind: ClassVar[str] = "facts"
    items: Sequence[Fact]
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Steps:
    """A numbered list under a heading."""

    kind: ClassVar[str] = "steps"
    title: str
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first cell of a row names it, the others align as numbers.

    ``shares`` [rows], of 1, draws a bar behind each row; ``folded`` is for what few will read;
    ``words`` are columns, by number, that hold text.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    simulated: bool = False
    shares: Sequence[float] = ()
    folded: bool = False
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A picture file, embedded."""

    kind: ClassVar[str] = "picture"
    name: str
    source: str
    width: int
    height: int
    alt: str
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing in the page itself, with a key of (colour, name) pairs."""

    kind: ClassVar[str] = "chart"
    svg: Markup
    caption: str
    key: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Side:
    """Blocks side by side where there is room."""

    kind: ClassVar[str] = "side"
    items: Sequence[Picture | Chart | Table]


@dataclass(frozen=True)
class Source:
    """Text as it stands in a file, folded."""

    kind: ClassVar[str] = "source"
    title: str
    text: str
    open: bool = False


@dataclass(frozen=True)
class Files:
    """Files of the run folder as links: name, what it is, size in words."""

    kind: ClassVar[str] = "files"
    items: Sequence[tuple[str, str, str]]


Block = Facts | Text | Steps | Table | Picture | Chart | Side | Source | Files


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; without blocks it is left out."""

    name: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
