"""A page of text, tables and figures, as one HTML file and as Markdown for the documentation."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from eamnet.metrics import write_atomic

__all__ = ["Page", "Plot", "Table"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a caption; its first column names the rows."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure, saved as ``name``.png, and what it shows."""

    name: str
    figure: Figure
    alt: str

    @property
    def png(self) -> bytes:
        """The figure as a PNG."""
        buffer = io.BytesIO()
        # Without the writer's version the same results give the same bytes.
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


@dataclasses.dataclass
class Page:
    """Blocks under a title; a string is a paragraph.

    Attributes:
        title: of the page.
        blocks: from top to bottom.
        configuration: shown at the end of the HTML page.
    """

    title: str
    blocks: list[str | Table | Plot]
    configuration: str = ""

    def write(self, folder: Path) -> Path:
        """Write the figures and ``report.html``, which needs nothing else, into a folder."""
        blocks: list[dict[str, object]] = []
        for block in self.blocks:
            if isinstance(block, Plot):
                png = block.png
                write_atomic(folder / f"{block.name}.png", png)
                uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
                width = round(block.figure.get_figwidth() * 100)
                blocks.append({"uri": uri, "alt": block.alt, "width": width})
            elif isinstance(block, Table):
                blocks.append(dataclasses.asdict(block))
            else:
                blocks.append({"text": block})
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        html = environment.get_template("page.html").render(
            title=self.title, blocks=blocks, configuration=self.configuration
        )
        path = folder / "report.html"
        write_atomic(path, html.encode())
        return path

    def markdown(self, figures: str) -> str:
        """The blocks as Markdown, with the figures in the folder ``figures``."""
        parts = []
        for block in self.blocks:
            if isinstance(block, Plot):
                parts.append(f"![{block.alt}]({figures}/{block.name}.png)")
            elif isinstance(block, Table):
                lines = [block.header, ["---"] * len(block.header), *block.rows]
                table = "\n".join(
                    f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines
                )
                parts.append(f"{block.caption}\n\n{table}")
            else:
                parts.append(block)
        return "\n\n".join(parts)

    def insert(self, document: Path, folder: Path) -> None:
        """Put the page between its markers in a Markdown document; at the end if there are none.

        Args:
            document: the file, made if there is none.
            folder: where :meth:`write` has put the figures; its name is that of the markers.
        """
        text = document.read_text(encoding="utf-8") if document.is_file() else ""
        begin, end = f"<!-- begin {folder.name} -->", f"<!-- end {folder.name} -->"
        if begin not in text or end not in text.partition(begin)[2]:
            if begin in text or end in text:
                raise ValueError(f"{document} has one of the markers {begin} and {end}, not both")
            text += f"{'' if text.endswith(chr(10)) or not text else chr(10)}\n{begin}\n{end}\n"
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        figures = Path(os.path.relpath(folder.resolve(), document.resolve().parent)).as_posix()
        content = f"{before}{begin}\n{self.markdown(figures)}\n{end}{after}"
        document.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(document, content.encode())
