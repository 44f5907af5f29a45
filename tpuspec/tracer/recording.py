"""One traced step of one replica, as a graph: what it reads, what it writes, what it computes with besides."""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpuspec.spec.backend import Replica, StepFunction
from tpuspec.spec.engine import Layout
from tpuspec.spec.instances import instances_of
from tpuspec.spec.results import StepOutput, flat_tensors, rebuild
from tpuspec.spec.user_threads import USER_THREADS
from tpuspec.tracer import graph
from tpuspec.tracer.guards import Guard, GuardedReads, InputsOf
from tpuspec.tracer.host_reads import HostReads, told_read
from tpuspec.tracer.layouts import of_sources
from tpuspec.tracer.number_plan import NumberPlan
from tpuspec.tracer.on_engine import CompiledGraph, OnEngine
from tpuspec.tracer.optimizer_numbers import OptimizerNumbers
from tpuspec.tracer.optimizer_places import read_numbers
from tpuspec.tracer.python_state import Memory, changed
from tpuspec.tracer.sent_batch import SentBatch
from tpuspec.tracer.slots import GRADIENT, Slot, gradient_owners, module_tensors, read_slots
from tpuspec.tracer.sources import Source, Sources
from tpuspec.tracer.traced_numbers import Leaf

_MAX_ORDERS = 10
"""Two or three are usual."""


@dataclass(slots=True, kw_only=True)
class Recording:
    """A traced step that has not run yet.

    Attributes:
      output: what the step returned, with empty tensors in the places of its own.
      tensors: the output's tensors, flat; none once it has run.
      sources: where each of them comes from.
      inputs: where each input of the graph comes from.
      values: the inputs of this very step.
      plan: what the optimizers compute with numbers.
      leaves: values of the numbers that it starts from.
      constants: inputs that are neither state, batch, number nor seed.
      numbers: the constants on the host, for comparing.
      written: slots that the graph writes, in the order of its first outputs, which is that of its inputs.
      created: slots that were not there before.
      dropped: slots that are not there any more.
      roots: what the graph computes: slots, then tensors for the host, then tensors that Python code keeps.
      slots: the state's tensors after the step.
      guards: numbers that it read from the device, in their order.
      notes: why this step could not be replayed, one line each.
      is_doubtful: whether the only reason may be the doing of another thread.
      is_watched: whether the step's Python code was watched.
      has_read: whether it reads the device.
      given, made: layouts of the inputs and of the roots.
      compiled: the graph; None before it is compiled, and where there is nothing to compute.
    """

    output: StepOutput
    tensors: list[Tensor]
    plan: NumberPlan
    leaves: dict[Leaf, Any]
    sources: list[Source] = field(default_factory=list)
    inputs: list[Source] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    written: list[Slot] = field(default_factory=list)
    created: list[Slot] = field(default_factory=list)
    dropped: list[Slot] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)
    slots: dict[Slot, Tensor] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_doubtful: bool = False
    is_watched: bool = False
    has_read: bool = False
    given: list[Layout] = field(default_factory=list)
    made: list[Layout] = field(default_factory=list)
    compiled: CompiledGraph | None = None

    @property
    def graph(self) -> bytes:
        """Hash of the compiled graph."""
        return self.compiled.key if self.compiled is not None else b""

    @property
    def answers(self) -> tuple[str, ...]:
        """What its guards read."""
        return tuple(guard.answer for guard in self.guards)


class Before:
    """A replica's state before a step, to go back to.

    Nothing is pending on its device then: what is pending after a trace is the step's doing.

    Args:
      replica: the replica.
      runtime: will run the step.
      is_traced: whether it is traced next.

    Attributes:
      given: slot -> `tensor_id` of what was found there; what was shared or pending has another one since.
    """

    def __init__(self, replica: Replica, runtime: OnEngine, *, is_traced: bool = True) -> None:
        self._replica = replica
        self.slots = read_slots(replica)
        self.given = {slot: graph.tensor_id(tensor) for slot, tensor in self.slots.items()}
        device = str(replica.device)
        runtime.settle(list(self.slots.values()), device)
        runtime.part(list(self.slots.values()), device)
        if is_traced:
            graph.forget_dtypes([tensor for slot, tensor in self.slots.items() if slot.kind != GRADIENT])
        if graph.num_pending(device):  # another Trainer's, or the user's own
            runtime.settle(list(_pending_tensors(device).values()), device)
        self.inner = {slot: graph.inner(tensor) for slot, tensor in self.slots.items()}
        # Else a constant of the trace could get the buffer, and the handle, of a slot that is only written.
        self._held = graph.held(list(self.slots.values()))
        # Read now: a tensor that a trace has used has no buffer of its own any more, only a node of the trace.
        self.handles = dict(zip(self.slots, graph.handles(list(self.slots.values())), strict=True))
        self.numbers = {slot: graph.tensor_id(tensor) for slot, tensor in self.slots.items()}
        self._gradients = {slot: owner.grad for slot, owner in gradient_owners(replica).items()}
        self._numbers = read_numbers(replica)
        self._optimizers = {name: {parameter: dict(state) if isinstance(state, dict) else state
                                   for parameter, state in optimizer.state.items()}
                            for name, optimizer in replica.optimizers.items()}

    def restore(self) -> None:
        """Puts the state back, and drops what is pending on the device."""
        for slot, owner in gradient_owners(self._replica).items():
            owner.grad = self._gradients[slot]
        for name, states in self._optimizers.items():
            kept = self._replica.optimizers[name].state
            kept.clear()
            kept.update(states)
        for held, number in self._numbers:
            held.put(number)
        graph.forget_pending(str(self._replica.device))
        for slot, tensor in self.slots.items():
            graph.publish(tensor, self.inner[slot])


class Watch(enum.Enum):
    """How closely a trace is watched.

    Attributes:
      nothing: it only runs.
      device: for reads of the device.
      all: for what its Python code remembers, too: this traces slower.
    """

    nothing = 0
    device = 1
    all = 2


def record(replica: Replica, step: StepFunction, batch: SentBatch, micro_step: int, *, before: Before,
           numbers: OptimizerNumbers, memory: Memory, runtime: OnEngine, inputs_of: InputsOf, watch: Watch,
           locate: bool = False, is_alone: bool = True) -> Recording:
    """Traces a step, which runs nothing, and says what its graph is made of; `compile_recording` comes next.

    Args:
      replica: its state is pending afterwards.
      step: the step.
      batch: on the device.
      micro_step: of the batch within an update.
      before: the replica's state.
      numbers: of the optimizers.
      memory: of the step's Python code.
      runtime: will run it, and runs what guards compute.
      inputs_of: returns the inputs of a graph of the step, from their sources and values.
      watch: what to look for that could not be replayed.
      locate: whether to find out where it reads the device.
      is_alone: whether there is one replica.
    """
    device = str(replica.device)
    seed = graph.get_seed(device)
    graph.set_seed(seed, device)  # drops what an unfinished trace has drawn
    mark = USER_THREADS.mark()
    is_watched = watch is Watch.all
    remembered = memory.all() if is_watched else {}
    reads = HostReads(locate=locate)
    try:
        with (runtime.tracing(), runtime.naming(replica.model), reads,
              numbers.in_place(watch=True) as of_step, graph.scalars_shared(),
              memory.watching() if is_watched else contextlib.nullcontext()):
            sources = Sources(before.handles, before.numbers, batch.tensors(), seed, of_step.ops.handles)
            guards = GuardedReads(sources.of, reads, runtime, inputs_of, batch.layouts, is_alone=is_alone)
            with guards.noted():
                output = step(replica, batch, micro_step)  # type: ignore[arg-type]  # a Batch in all but name
    finally:
        graph.allow_execution(True)
    # One of the host's own becomes a constant of the graph.
    tensors = [tensor.to(replica.device) for tensor in flat_tensors(output.tensors)]
    # Without its tensors: those that are views would be pending again once published, and be found as left over.
    form = replace(output, tensors=rebuild(output.tensors, itertools.repeat(torch.empty(0, device="meta"))))
    if replica.model is not None:
        _detach_kept(replica.model, replica.device)
    recording = Recording(output=form, tensors=tensors, slots=read_slots(replica), plan=of_step.plan(),
                          leaves=of_step.values, guards=guards.found, is_watched=is_watched)
    if (note := reads.note()) is not None:
        recording.notes.append(note)
        recording.has_read = True
    recording.notes += [told_read(place) for place in guards.of_numbers[:1]]
    if is_watched:
        if (outside := memory.outside()) is not None:
            recording.notes.append(f"it reads {outside}, which a replayed step would not do again. Read it in "
                                   "input_fn, a hook or host_call")
        if moved := changed(remembered, memory.all()) + of_step.notes():
            recording.is_doubtful = not recording.notes and USER_THREADS.ran_since(mark)
            whose = " (or a host function, or the input on its own thread)" if recording.is_doubtful else ""
            recording.notes.append(f"it{whose} changes what Python code remembers: " + "; ".join(moved[:3])
                                   + ". Side effects belong in host_call, counters in global_step or in a buffer")
    _wire(recording, before, sources, device, watch=watch is not Watch.nothing,
          batch=sources.batch if runtime.engine.batches_are_outputs else {})
    layouts = runtime.layouts
    recording.given = of_sources(layouts, recording.inputs, recording.values, batch.layouts)
    num_written = len(recording.written)
    recording.made = layouts.of_slots(recording.written, recording.roots[:num_written]) + (
        [layouts.of_output] * (len(recording.roots) - num_written))
    return recording


def _detach_kept(model: nn.Module, device: torch.device) -> None:
    """Lets tensors that modules keep stand for themselves: not for a view, and without the graph of a loss."""
    for module, _, name, tensor in list(module_tensors(model)):
        if tensor.device == device and (tensor._is_view() or tensor.grad_fn is not None):
            setattr(module, name, graph.computed(tensor))


def _wire(recording: Recording, before: Before, sources: Sources, device: str, *, watch: bool,
          batch: Mapping[int, Source]) -> None:
    after = recording.slots
    recording.created = [slot for slot in after if slot not in before.slots]
    recording.dropped = [slot for slot in before.slots if slot not in after]
    slots, states = list(after), list(after.values())
    of_state: set[int] = set()
    for slot, tensor, is_pending in zip(slots, states, graph.pending(states), strict=True):
        if not is_pending:
            if graph.tensor_id(tensor) == before.numbers.get(slot):
                continue
            graph.publish(tensor, graph.inner(graph.computed(tensor)))
        elif graph.tensor_id(tensor) in of_state:  # two places hold one tensor, as a loss kept in two buffers
            tensor.data = graph.computed(tensor)  # not published: that would write through to the other
        of_state.add(graph.tensor_id(tensor))
        recording.written.append(slot)
    recording.roots = [after[slot] for slot in recording.written]
    places: dict[int, int] = {}
    waiting = graph.pending(recording.tensors)
    for number, (tensor, is_pending) in enumerate(zip(recording.tensors, waiting, strict=True)):
        if not is_pending:
            source = batch.get(graph.tensor_id(tensor))
            if source is not None:
                recording.sources.append(source)
                continue
            # Of the state, whose buffer the next step writes, a constant of Python's, or rows that lie elsewhere.
            tensor = recording.tensors[number] = graph.computed(tensor)
        elif graph.tensor_id(tensor) in of_state:  # the next step writes its buffer
            tensor = recording.tensors[number] = graph.computed(tensor)
        place = places.setdefault(graph.tensor_id(tensor), len(recording.roots))
        if place == len(recording.roots):
            recording.roots.append(tensor)
        recording.sources.append(Source("graph", place))
    _keep_hidden(recording, before, device, watch=watch)
    for found, source in _find_inputs(recording, sources.of):
        if source is None:
            source = Source("constant", len(recording.constants))
            recording.constants.append(found.value)
        recording.inputs.append(source)
        recording.values.append(found.value)
    if watch:
        recording.numbers = graph.fetch(recording.constants)


def _find_inputs(recording: Recording, known: Callable[[graph.GraphInput], Source | None],
                 ) -> list[tuple[graph.GraphInput, Source | None]]:
    """Returns the graph's inputs with their sources, and puts the slots that it writes into the inputs' order.

    XLA gives donated buffers to outputs of their size, both in their order: where the orders differ, a slot is written
    to another one's buffer, and both are copied before. The order of the inputs depends on that of the outputs.
    """
    if not recording.roots:
        return []
    inputs = graph.graph_inputs(recording.roots)
    sources = {found.handle: known(found) for found in inputs}
    for _ in range(_MAX_ORDERS):
        places = {sources[found.handle]: place for place, found in enumerate(inputs)}
        order = sorted(recording.written, key=lambda slot: places.get(Source("slot", slot), math.inf))
        if order == recording.written:
            break
        recording.written = order
        recording.roots[:len(order)] = [recording.slots[slot] for slot in order]
        inputs = graph.graph_inputs(recording.roots)
    return [(found, sources[found.handle]) for found in inputs]


def _keep_hidden(recording: Recording, before: Before, device: str, *, watch: bool) -> None:
    """Makes roots of pending tensors that Python code keeps beside the spec: they would never get a value."""
    seen = [*recording.roots, *before.slots.values()]
    known = {graph.tensor_id(tensor) for tensor in graph.waiting(seen)}
    # A gradient is a view of what autograd keeps, which Python has no name for.
    gradients = [tensor for slots in (recording.slots, before.slots) for slot, tensor in slots.items()
                 if slot.kind == GRADIENT and (slot in recording.dropped or slots is recording.slots)]
    num_known = len(known) + sum(gradient._is_view() for gradient in gradients)
    if graph.num_pending(device) <= num_known:
        return
    gc.collect()  # cycles may hold the tensors of a spec that is gone
    if graph.num_pending(device) <= num_known:
        return
    hidden = _pending_tensors(device)
    left = [tensor for number, tensor in hidden.items() if number not in known]
    recording.roots += left
    if left and watch:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in left[:5])
        recording.notes.append(
            f"it leaves {len(left)} tensors behind, of shapes {shapes}, in an attribute, a list or the closure of a "
            "host function. Pass them to metric_fn or host_call in their tensors, or make them buffers")


def _pending_tensors(device: str) -> dict[int, Tensor]:
    """Returns the live tensors of a device that are still to be computed, by their tensor_id."""
    kept = [item for item in instances_of(Tensor) if _is_on(item, device) and torch._is_functional_tensor(item)]
    return {graph.tensor_id(tensor): tensor for tensor in graph.waiting(kept)}


def _is_on(tensor: Tensor, device: str) -> bool:
    try:
        return tensor.device.type == "xla" and str(tensor.device) == device
    except RuntimeError:  # it has no device: another thread is just giving it up
        return False


def compile_recording(recording: Recording, device: str, runtime: OnEngine) -> None:
    """Compiles a recording's graph unless it is known; afterwards its pending tensors hold no value until it is run."""
    if recording.roots and recording.has_read:  # it goes on where it read: on torch_xla's own runtime
        key = graph.compile_graph(recording.roots)
        recording.compiled = CompiledGraph(key, functools.partial(graph.run, key))
    elif recording.roots:
        written = set(recording.written)
        donated = [place for place, source in enumerate(recording.inputs)
                   if source.kind == "slot" and source.key in written]
        recording.compiled = runtime.compile(recording.roots, donated, recording.given, recording.made, len(written))
    graph.forget_pending(device)


@contextlib.contextmanager
def undone_on_error(before: Before) -> Iterator[None]:
    """Puts the state back where the block raises."""
    try:
        yield
    except BaseException:
        before.restore()
        raise
