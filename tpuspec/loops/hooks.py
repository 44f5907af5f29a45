"""Calls hooks around a loop: each in its order, `end` always, the first error wins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from tpuspec import summary
from tpuspec.drain.executor import host_call_error
from tpuspec.errors import ConfigTypeError
from tpuspec.spec.hooks import CheckpointSaverListener, HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase
from tpuspec.spec.user_threads import USER_CODE, is_users
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)


def check_hooks(hooks: Iterable[object] | None) -> tuple[SessionRunHook, ...]:
    """Returns the hooks as a tuple.

    Raises:
      ConfigTypeError: one is no SessionRunHook.
    """
    checked = tuple(hooks or ())
    for hook in checked:
        if not isinstance(hook, SessionRunHook):
            raise ConfigTypeError(f"Hooks must be a SessionRunHook, given: {hook!r}.")
    return checked  # type: ignore[return-value]


def check_listeners(listeners: Iterable[object] | None) -> tuple[CheckpointSaverListener, ...]:
    """Returns the saving listeners as a tuple.

    Raises:
      ConfigTypeError: one is no CheckpointSaverListener.
    """
    checked = tuple(listeners or ())
    for listener in checked:
        if not isinstance(listener, CheckpointSaverListener):
            raise ConfigTypeError(f"saving_listeners must be a list of CheckpointSaverListener, given: {listener!r}.")
    return checked  # type: ignore[return-value]


def _note_user_code(owner: object) -> None:
    """A captured step is held against a new trace after it."""
    if is_users(owner):
        USER_CODE.ran()


class HookRunner:
    """Hooks of one call of train, evaluate or predict, with the context they share.

    As a context manager it calls `begin` at the start, and `end` of every hook that began, also after an error.

    Args:
      hooks: in their order.
      context: what they share.
      writer: default writer of hooks that belong to one step, the native path's host_call.
      summary_step: their default step; None takes the step itself.
    """

    def __init__(self, hooks: Iterable[SessionRunHook], context: HookContext, *, writer: SummaryWriter,
                 summary_step: int | None = None) -> None:
        self.context = context
        self._writer = writer
        self._summary_step = summary_step
        self._hooks = tuple(hooks)
        self._begun: list[SessionRunHook] = []

    def __enter__(self) -> Self:
        try:
            for hook in self._hooks:
                self._begun.append(hook)
                _note_user_code(hook)
                with _phase_of(hook, "begin"):
                    hook.begin(self.context)
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        second = self._end(error)
        if error is None and second is not None:
            raise second

    @property
    def are_any(self) -> bool:
        """Whether there is a hook."""
        return bool(self._hooks)

    def before_run(self, step: int) -> None:
        """Calls before_run of every hook."""
        self._call("before_run", step)

    def after_run(self, step: int, step_hooks: Iterable[SessionRunHook] = ()) -> None:
        """Calls after_run of every hook, then of those that belong to this very step.

        Raises:
          HostCallError: a hook of the step raised.
        """
        self._call("after_run", step)
        for hook in step_hooks:
            _note_user_code(hook)
            with summary.as_default(self._writer, step if self._summary_step is None else self._summary_step):
                try:
                    hook.after_run(self.context)
                except Exception as error:
                    before = step - 1 if self.context.mode == ModeKeys.TRAIN else None
                    raise host_call_error("host_call", step, error, global_step=before) from error

    def _call(self, name: str, step: int) -> None:
        self.context.step = step
        for hook in self._hooks:
            _note_user_code(hook)
            with _phase_of(hook, name):
                getattr(hook, name)(self.context)

    def _end(self, first: BaseException | None) -> BaseException | None:
        """Ends the hooks that began; returns the first error among theirs if there was none before."""
        raised: BaseException | None = None
        while self._begun:
            hook = self._begun.pop(0)
            try:
                with _phase_of(hook, "end"):
                    hook.end(self.context)
            except BaseException as error:  # the other hooks' end comes first, even before an interrupt
                if first is None and raised is None:
                    raised = error
                else:
                    logger.warning("end of hook %r failed too: %s", hook, error)
        return raised


def _phase_of(hook: SessionRunHook, method: str) -> contextlib.AbstractContextManager[None]:
    return in_phase(f"{type(hook).__name__}.{method}")


class ListenerRunner:
    """Saving listeners around each save."""

    def __init__(self, listeners: Iterable[CheckpointSaverListener]) -> None:
        self._listeners = tuple(listeners)

    def begin(self) -> None:
        """Calls begin of every listener."""
        for listener in self._listeners:
            _note_user_code(listener)
            listener.begin()

    def around(self, global_step: int, save: Callable[[], object]) -> bool:
        """Saves between before_save and after_save; returns whether a listener asks to stop."""
        for listener in self._listeners:
            _note_user_code(listener)
            listener.before_save(global_step)
        save()
        answers = [listener.after_save(global_step) for listener in self._listeners]
        return any(answer is True for answer in answers)

    def end(self, global_step: int) -> None:
        """Calls end of every listener."""
        for listener in self._listeners:
            listener.end(global_step)
