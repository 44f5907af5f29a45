"""Screen: what is printed of a run, in rich; imported only where something is printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tpuspec.summary.readable import aligned_lines


class Screen:
    """Frames, tables and a live line where the console can redraw a line, plain lines where it cannot.

    Args:
      console: None takes standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None

    @property
    def can_redraw(self) -> bool:
        """Whether the console is a terminal that can redraw a line."""
        return self._console.is_interactive and not self._console.is_jupyter

    @property
    def is_closed(self) -> bool:
        """Whether the console's file was closed."""
        return getattr(self._console.file, "closed", False)

    def lines(self, *lines: str) -> None:
        """Prints lines as they are: no markup, no colours, no wrapping."""
        text = self._encodable("\n".join(lines))
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """Prints names and values in a frame."""
        if not self.can_redraw:
            self.lines(*aligned_lines(title, rows))
            return
        frame = box.ROUNDED if self._encoding.startswith("utf") else box.ASCII
        self._console.print(Panel(self._grid(rows), title=self._line(title, "bold"), title_align="left", expand=False,
                                  padding=(0, 1), box=frame))

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Prints names and values below a title."""
        if not self.can_redraw:
            self.lines(*aligned_lines(title, rows))
            return
        self._console.print(self._line(title, "bold"))
        self._console.print(Padding(self._grid(rows), (0, 0, 0, 2), expand=False))

    def start_live(self, line: str) -> None:
        """Shows a live line at the bottom, which takes no thread: it changes when told."""
        # Only what goes to this very terminal passes through the live line: a redirected stderr stays in its file.
        is_standard = self._console.file in (sys.stdout, sys.stderr)
        self._live = Live(self._line(line), console=self._console, auto_refresh=False,
                          redirect_stdout=is_standard and _is_terminal(sys.stdout),
                          redirect_stderr=is_standard and _is_terminal(sys.stderr))
        self._live.start(refresh=True)

    def draw(self, line: str) -> None:
        """Redraws the live line, or prints a line where none is live."""
        if self._live is None:
            self.lines(line)
        else:
            self._live.update(self._line(line), refresh=True)

    def stop_live(self) -> None:
        """Ends the live line, which stays on the screen, and gives the cursor and the standard streams back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def silence(self) -> None:
        """Drops all further output of the console."""
        self._console.quiet = True

    def _line(self, text: str, style: str = "") -> Text:
        # Crop: the ellipsis is no character of every terminal.
        return Text(self._encodable(text), style=style, no_wrap=True, overflow="crop")

    def _grid(self, rows: Mapping[str, str]) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(Text(self._encodable(name)), Text(self._encodable(value)))
        return grid

    @property
    def _encoding(self) -> str:
        # Console.encoding is utf-8 for standard output, whatever that has.
        return (getattr(self._console.file, "encoding", None) or "utf-8").lower()

    def _encodable(self, text: str) -> str:
        return text.encode(self._encoding, "replace").decode(self._encoding)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()
