"""Progress: what a person sees of a run: a banner, one live line, tables."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from tpuspec.summary.readable import ProgressLine, format_value

if TYPE_CHECKING:
    from rich.console import Console

    from tpuspec.summary.terminal import Screen

_SECONDS_BETWEEN_DRAWS = 0.2


class Progress:
    """Prints to a terminal with one live line, or as plain whole lines to anything else.

    Methods may be called from any thread. No thread is started. Output that fails (a closed pipe or stdout) ends all
    output of this object, never the run. While the line is live, print() appears above it.

    Args:
      enabled: False prints nothing at all.
      console: where to print; None takes standard output.
      clock: returns seconds, for the pace of the live line.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.RLock()
        self._clock = clock
        self._screen = _make_screen(console) if enabled else None
        self._has_banner = False
        self._description: str | None = None
        self._total: int | None = None
        self._seconds_between_draws = _SECONDS_BETWEEN_DRAWS if self.is_live else 0.0
        self._next_draw = 0.0
        self._pending: ProgressLine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def is_live(self) -> bool:
        """Whether update() redraws one line, and may be called on every step; else each update prints a line."""
        screen = self._screen
        return screen is not None and screen.can_redraw

    def banner(self, title: str, facts: Mapping[str, str]) -> None:
        """Prints the facts of a run, the first time that it is called."""
        with self._output() as screen:
            if screen is not None and not self._has_banner:
                self._has_banner = True
                screen.panel(title, facts)

    def start(self, description: str, total: int | None) -> None:
        """Begins a line for a loop, and ends the one before.

        Args:
          description: first word of the line, such as 'train'.
          total: steps of the loop; None where it is not known.
        """
        with self._lock:
            self.stop()
            self._description, self._total, self._next_draw = description, total, self._clock()
            with self._output() as screen:
                if screen is not None and screen.can_redraw:
                    screen.start_live(description)

    def update(self, step: int, *, loss: float | None = None, steps_per_second: float | None = None,
               examples_per_second: float | None = None, step_kind: str = "") -> None:
        """Shows the state of the loop; does nothing before start() and after stop().

        Args:
          step: completed updates.
          loss: None leaves it out; so for the rates.
          steps_per_second: rate, measured by the caller.
          examples_per_second: likewise.
          step_kind: such as 'replay' or 'traced'; '' leaves it out.
        """
        with self._lock:
            if self._screen is None or self._description is None:
                return
            self._pending = ProgressLine(
                description=self._description, total=self._total, step=step, loss=loss,
                steps_per_second=steps_per_second, examples_per_second=examples_per_second, step_kind=step_kind)
            now = self._clock()
            if now >= self._next_draw:
                self._next_draw = now + self._seconds_between_draws
                self._draw()

    def stop(self) -> None:
        """Shows the last state and ends the line, which stays on the screen."""
        with self._lock:
            self._draw()
            self._description = None
            with self._output() as screen:
                if screen is not None:
                    screen.stop_live()

    def table(self, title: str, values: Mapping[str, Any]) -> None:
        """Prints names and values: numbers, small arrays, or dtype and shape of larger ones."""
        with self._output() as screen:
            if screen is not None:
                screen.table(title, {name: format_value(value) for name, value in values.items()})

    def message(self, text: str) -> bool:
        """Prints a text on lines of its own; returns whether there is a screen."""
        with self._output() as screen:
            if screen is not None:
                screen.lines(*text.splitlines())
        return screen is not None

    def _draw(self) -> None:
        line, self._pending = self._pending, None
        with self._output() as screen:
            if screen is not None and line is not None:
                screen.draw(line.text())

    @contextlib.contextmanager
    def _output(self) -> Iterator[Screen | None]:
        with self._lock:
            screen = self._screen
            try:
                yield screen
            except (OSError, SystemExit):
                # rich raises SystemExit after a broken pipe; it would end the run.
                self._go_silent()
            except ValueError:
                if screen is not None and not screen.is_closed:
                    raise
                self._go_silent()

    def _go_silent(self) -> None:
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.silence()
            with contextlib.suppress(OSError, ValueError, SystemExit):
                screen.stop_live()


def _make_screen(console: Console | None) -> Screen:
    from tpuspec.summary.terminal import Screen

    return Screen(console)
