import logging

import pytest

from tpuspec import summary
from tpuspec.errors import ConfigTypeError, HostCallError
from tpuspec.loops.hooks import HookRunner, ListenerRunner, check_hooks, check_listeners
from tpuspec.spec.hooks import CheckpointSaverListener, HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.testing import MemoryWriter


class Noting(SessionRunHook):
    """Notes its calls, and raises `errors[name]` from the call of that name."""

    def __init__(self, name, events, **errors):
        self.name, self.events, self.errors = name, events, errors

    def _note(self, call, context):
        self.events.append(f"{self.name}.{call} {context.step}")
        if call in self.errors:
            raise self.errors[call]

    def begin(self, context):
        self._note("begin", context)

    def before_run(self, context):
        self._note("before_run", context)

    def after_run(self, context):
        self._note("after_run", context)

    def end(self, context):
        self._note("end", context)

    def __repr__(self):
        return f"<{self.name}>"


def runner_of(*hooks, mode=ModeKeys.TRAIN, writer=None, summary_step=None):
    return HookRunner(hooks, HookContext(mode=mode), writer=writer or MemoryWriter(), summary_step=summary_step)


def test_every_call_reaches_the_hooks_in_their_order_with_the_step():
    events = []
    with runner_of(Noting("a", events), Noting("b", events)) as hooks:
        hooks.before_run(3)
        hooks.after_run(5)
    assert events == ["a.begin 0", "b.begin 0", "a.before_run 3", "b.before_run 3", "a.after_run 5", "b.after_run 5",
                      "a.end 5", "b.end 5"]


def test_hooks_share_one_context():
    class Stopping(SessionRunHook):
        def after_run(self, context):
            context.request_stop()

    runner = runner_of(Stopping(), SessionRunHook())
    with runner:
        assert not runner.context.stop_requested
        runner.after_run(1)
        assert runner.context.stop_requested


@pytest.mark.parametrize("call", ["before_run", "after_run"])
def test_an_error_of_a_hook_surfaces_as_itself_after_the_end_of_all_hooks(call):
    events, error = [], ValueError("mine")
    with pytest.raises(ValueError, match="^mine$") as caught, runner_of(
            Noting("a", events, **{call: error}), Noting("b", events)) as hooks:
        getattr(hooks, call)(1)
    assert caught.value is error
    assert events == ["a.begin 0", "b.begin 0", f"a.{call} 1", "a.end 1", "b.end 1"]


def test_an_error_of_the_loop_surfaces_as_itself_after_the_end_of_all_hooks():
    events = []
    with pytest.raises(KeyError, match="loop"), runner_of(Noting("a", events), Noting("b", events)):
        raise KeyError("loop")
    assert events[-2:] == ["a.end 0", "b.end 0"]


def test_an_error_of_begin_ends_the_hooks_that_began_and_begins_no_other():
    events = []
    hooks = runner_of(Noting("a", events), Noting("b", events, begin=ValueError("mine")), Noting("c", events))
    with pytest.raises(ValueError, match="^mine$"), hooks:
        pytest.fail("the loop must not start")
    assert events[:2] == ["a.begin 0", "b.begin 0"]
    assert "a.end 0" in events
    assert not any(event.startswith("c.") for event in events)


def test_an_error_of_one_end_lets_the_other_hooks_end_and_then_surfaces():
    events, error = [], ValueError("mine")
    with pytest.raises(ValueError, match="^mine$") as caught, runner_of(
            Noting("a", events, end=error), Noting("b", events)):
        pass
    assert caught.value is error
    assert events[-2:] == ["a.end 0", "b.end 0"]


def test_the_first_of_two_errors_of_end_wins_and_the_second_is_logged(caplog):
    with (caplog.at_level(logging.WARNING, "tpuspec"), pytest.raises(ValueError, match="^first$"),
          runner_of(Noting("a", [], end=ValueError("first")), Noting("b", [], end=ValueError("second")))):
        pass
    assert "end of hook <b> failed too: second" in caplog.text


def test_an_error_of_the_loop_wins_over_one_of_end_which_is_logged(caplog):
    with (caplog.at_level(logging.WARNING, "tpuspec"), pytest.raises(KeyError, match="loop"),
          runner_of(Noting("a", [], end=ValueError("later")))):
        raise KeyError("loop")
    assert "end of hook <a> failed too: later" in caplog.text


def test_an_interrupt_ends_the_hooks_too():
    events = []
    with pytest.raises(KeyboardInterrupt, match="stop"), runner_of(Noting("a", events)):
        raise KeyboardInterrupt("stop")
    assert events[-1] == "a.end 0"


class WritingHook(SessionRunHook):
    def after_run(self, context):
        summary.scalar("mine", 1.0)


@pytest.mark.parametrize(("summary_step", "expected"), [(None, 7), (40, 40)])
def test_hooks_of_one_step_run_after_the_others_and_write_to_the_default_writer(summary_step, expected):
    events, writer = [], MemoryWriter()
    with runner_of(Noting("a", events), writer=writer, summary_step=summary_step) as hooks:
        hooks.after_run(7, [Noting("step", events), WritingHook()])
    assert events == ["a.begin 0", "a.after_run 7", "step.after_run 7", "a.end 7"]
    assert [(record.name, record.step) for record in writer.records] == [("mine", expected)]


@pytest.mark.parametrize(("mode", "message"), [
    (ModeKeys.TRAIN, r"^host_call raised ValueError at step 7 \(global_step 6 before its update\): mine$"),
    (ModeKeys.EVAL, "^host_call raised ValueError at step 7: mine$")])
def test_an_error_of_a_hook_of_one_step_names_the_step_and_keeps_its_cause(mode, message):
    error = ValueError("mine")
    with pytest.raises(HostCallError, match=message) as caught, runner_of(mode=mode) as hooks:
        hooks.after_run(7, [Noting("step", [], after_run=error)])
    assert caught.value.__cause__ is error


def test_hook_03_only_hooks_are_hooks():
    hook = SessionRunHook()
    assert check_hooks(None) == ()
    assert check_hooks(iter([hook])) == (hook,)
    with pytest.raises(ConfigTypeError, match="Hooks must be a SessionRunHook, given: 'NotAHook'"):
        check_hooks([hook, "NotAHook"])


def test_train_10_only_listeners_are_listeners():
    listener = CheckpointSaverListener()
    assert check_listeners(None) == ()
    assert check_listeners([listener]) == (listener,)
    with pytest.raises(ConfigTypeError, match="saving_listeners must be a list of CheckpointSaverListener, given:"):
        check_listeners([SessionRunHook()])


class NotingListener(CheckpointSaverListener):
    def __init__(self, name, events, answer=None):
        self.name, self.events, self.answer = name, events, answer

    def begin(self):
        self.events.append(f"{self.name}.begin")

    def before_save(self, global_step):
        self.events.append(f"{self.name}.before {global_step}")

    def after_save(self, global_step):
        self.events.append(f"{self.name}.after {global_step}")
        return self.answer

    def end(self, global_step):
        self.events.append(f"{self.name}.end {global_step}")


def test_hook_06_listeners_stand_around_the_save_in_their_order():
    events = []
    runner = ListenerRunner([NotingListener("a", events), NotingListener("b", events)])
    runner.begin()
    assert not runner.around(4, lambda: events.append("save"))
    runner.end(5)
    assert events == ["a.begin", "b.begin", "a.before 4", "b.before 4", "save", "a.after 4", "b.after 4", "a.end 5",
                      "b.end 5"]


@pytest.mark.parametrize(("answers", "stops"), [((True, None), True), ((None, True), True), ((None, False), False)])
def test_hook_06_any_listener_that_answers_true_stops_and_all_are_told(answers, stops):
    events = []
    runner = ListenerRunner([NotingListener(str(i), events, answer) for i, answer in enumerate(answers)])
    assert runner.around(1, lambda: None) is stops
    assert events[-2:] == ["0.after 1", "1.after 1"]
