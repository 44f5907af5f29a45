"""The state of a replica between replayed steps, when modules and optimizers do not hold it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpuspec.spec.backend import CompiledStep, Replica
from tpuspec.spec.engine import OWN, Layout
from tpuspec.spec.pieces import Stored
from tpuspec.tracer import graph
from tpuspec.tracer.guards import InputsOf
from tpuspec.tracer.layouts import of_sources
from tpuspec.tracer.on_engine import OnEngine
from tpuspec.tracer.recording import Before, Recording
from tpuspec.tracer.sent_batch import SentBatch
from tpuspec.tracer.slots import GRADIENT, Slot, gradient_owners, read_slots
from tpuspec.tracer.sources import Source

_MOST_BYTES_SENT = 1 << 25


class _Known(NamedTuple):
    """An array that has the value of a tensor of the state.

    Attributes:
      array: the array.
      handle: of the tensor's buffer, which tells whether it was written since; None where its buffer is gone.
      version: of the tensor, which tells it there.
      held: keeps the buffer, so that no other one gets its handle.
    """

    array: Any
    handle: int | None
    version: int
    held: Any


class ReplicaState:
    """A replica's state in the arrays of an engine; module and optimizers hold copies where somebody reads them.

    A tensor of theirs whose value stands in an array alone has a buffer that is gone: reading it is an error.

    Attributes:
      replica: the replica that is traced.
      runtime: runs its programs.
      values: number of a slot -> its newest value, while steps are replayed.
      seed: of the next step.
      holder: the step that has it, to be told where another step goes on from it.
    """

    holder: CompiledStep | None = None

    def __init__(self, replica: Replica, runtime: OnEngine) -> None:
        self.replica, self.runtime = replica, runtime
        self.device = str(replica.device)
        self.values: list[Any] = []
        self.seed = 0
        self._engine = runtime.engine
        self._tensors: dict[Slot, Tensor] = {}
        self._known: dict[int, _Known] = {}
        self._gone: dict[Slot, Tensor] = {}
        self._is_left = False

    def arrays_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Returns for each tensor the array that has its value; None where the tensor has it itself."""
        found = [self._known.get(graph.tensor_id(tensor)) for tensor in tensors]
        # A copy from the host leaves a tensor its id, and gives it another buffer.
        real = [i for i, known in enumerate(found) if known is not None and known.handle is not None]
        pending = graph.pending([tensors[i] for i in real])
        real = [i for i, is_pending in zip(real, pending, strict=True) if not is_pending]
        handles = dict(zip(real, graph.handles([tensors[i] for i in real]), strict=True))
        return [None if known is None or (
            handles.get(i) != known.handle if known.handle is not None else tensors[i]._version != known.version
        ) else known.array for i, known in enumerate(found)]

    def _note_real(self, tensors: Sequence[Tensor], arrays: Sequence[Any]) -> None:
        """Takes note that tensors, which hold their values, are copies of arrays."""
        held = graph.held(tensors)
        for tensor, array, handle in zip(tensors, arrays, graph.handles(tensors), strict=True):
            self._known[graph.tensor_id(tensor)] = _Known(array, handle, tensor._version, held)

    def adopt(self, numbers: dict[Slot, int]) -> None:
        """Takes the state over from module and optimizers, as far as it was written there."""
        slots = self._tensors = read_slots(self.replica)
        self.runtime.settle(list(slots.values()), self.device)
        known = dict(zip(slots, self.arrays_of(list(slots.values())), strict=True))
        fresh = [slot for slot, array in known.items() if array is None]
        missing = [slots[slot] for slot in fresh]
        taken = self.runtime.take(missing, self.runtime.layouts.of_slots(fresh, missing))
        arrays = known | dict(zip(fresh, taken, strict=True))
        self._known = {number: self._known[number] for slot, tensor in slots.items()
                       if known[slot] is not None and (number := graph.tensor_id(tensor)) in self._known}
        self._note_real([slots[slot] for slot in fresh], taken)
        for slot in slots:
            numbers.setdefault(slot, len(numbers))
        self.values = [None] * len(numbers)
        for slot, array in arrays.items():
            self.values[numbers[slot]] = array
        self.seed = graph.get_seed(self.device)
        self._is_left = False

    def leave_module(self) -> None:
        """Lets module and optimizers hold no values: the state is there once, and nobody reads an old one."""
        if not self._is_left:
            self._is_left = True
            owners = gradient_owners(self.replica)
            for slot in self._tensors:
                if slot.kind == GRADIENT:
                    owners[slot].grad = None
            self._give({slot: tensor for slot, tensor in self._tensors.items() if slot.kind != GRADIENT})

    def launch(self, recording: Recording, before: Before, batch: SentBatch) -> list[Any]:
        """Runs a compiled recording on the values of its very step; the newest state is in arrays afterwards."""
        if recording.has_read:  # compiled for torch_xla's own runtime, where it read
            results = list(recording.compiled.run(recording.values)) if recording.compiled else []
            for root, value in zip(recording.roots, results, strict=True):
                graph.publish(root, graph.inner(value))
            forget_step(recording)
            return results
        after = recording.slots
        known = self._at_start(before)
        feed = self._feed(recording.inputs, recording.values, recording.given, known, batch)
        num_written = len(recording.written)
        others = [weakref.ref(root) for root in recording.roots[num_written:]]
        forget_step(recording)
        results = list(recording.compiled.run(feed)) if recording.compiled else []
        written = dict(zip(recording.written, results, strict=False))
        stayed = [slot for slot in known if slot not in written and slot in after]
        self._known = {}
        self._note_real([after[slot] for slot in stayed], [known[slot] for slot in stayed])
        owners = gradient_owners(self.replica)
        gradients = [slot for slot in written if slot.kind == GRADIENT]
        for slot, sent in zip(gradients, self._send([written[slot] for slot in gradients]), strict=True):
            owners[slot].grad = sent
            self._note_real([sent], [written.pop(slot)])
        self._give({slot: after[slot] for slot in written}, written)
        kept = [(root, value) for ref, value in zip(others, results[num_written:], strict=True)
                if (root := ref()) is not None]
        for (root, _), sent in zip(kept, self._send([value for _, value in kept]), strict=True):
            graph.publish(root, graph.inner(sent))
        return results

    def note(self, before: Before) -> None:
        """Takes note of which tensors a trace starts from."""
        # The trace starts from other tensors, with the same buffers where they are those of the state.
        found = {slot: self._known.get(number) for slot, number in before.given.items()}
        self._known |= {before.numbers[slot]: known for slot, known in found.items()
                        if known is not None and known.handle == before.handles[slot]}

    def inputs_of(self, before: Before, batch: SentBatch) -> InputsOf:
        """Returns a function from the sources of a graph's inputs, and their values in a trace, to its inputs."""
        known = self._at_start(before)
        return lambda sources, values: self._feed(
            sources, values, of_sources(self.runtime.layouts, sources, values, batch.layouts), known, batch)

    def _at_start(self, before: Before) -> dict[Slot, Any]:
        """Returns the arrays that have the values of a step's start."""
        return {slot: known.array for slot, number in before.numbers.items()
                if (known := self._known.get(number)) is not None and known.handle == before.handles[slot]}

    def _feed(self, sources: Sequence[Source], values: Sequence[Tensor], layouts: Sequence[Layout],
              known: dict[Slot, Any], batch: SentBatch) -> list[Any]:
        """Returns the inputs of a graph; adds to `known` what was not."""
        feed = [known.get(source.key) if source.kind == "slot" else
                batch.arrays[source.key] if source.kind == "batch" else
                self.runtime.seed(graph.read_seed(value)) if source.kind == "seed" else None
                for source, value in zip(sources, values, strict=True)]
        missing = [place for place, value in enumerate(feed) if value is None]
        taken = self.runtime.take([values[i] for i in missing], [layouts[i] for i in missing])
        for place, array in zip(missing, taken, strict=True):
            feed[place] = array
            if sources[place].kind == "slot":
                known[sources[place].key] = array
        return feed

    def publish(self, numbers: dict[Slot, int], written: set[int], *, readable: bool = True) -> None:
        """Gives the newest values back to module and optimizers; they still stand in arrays alone unless `readable`."""
        owners = gradient_owners(self.replica)
        written_over: dict[Slot, Any] = {}
        for slot, number in numbers.items():
            if number >= len(self.values) or (number not in written and not (slot.kind == GRADIENT and self._is_left)):
                continue
            value = self.values[number]
            if slot.kind != GRADIENT:
                tensor = self._tensors[slot]
                known = self._known.get(graph.tensor_id(tensor))
                if known is not None and known.handle is None and known.version == tensor._version:
                    self._known[graph.tensor_id(tensor)] = known._replace(array=value)
                else:  # it was written within the loop: what the steps made of it is newer
                    written_over[slot] = value
            elif value is None:
                owners[slot].grad = None
            else:
                (sent,) = self._send([value])
                owners[slot].grad = sent
                self._note_real([sent], [value])
        self._give({slot: self._tensors[slot] for slot in written_over}, written_over)
        graph.set_seed(self.seed, self.device)
        if readable:
            self.make_readable()
        self.values, self._tensors = [], {}

    def make_readable(self) -> None:
        """Gives module and optimizers copies of what stands in arrays alone."""
        slots = read_slots(self.replica)
        left = {slot: known for slot, tensor in slots.items()
                if (known := self._known.get(graph.tensor_id(tensor))) is not None and known.handle is None
                and tensor._version == known.version}
        for (slot, _), sent in zip(left.items(), self._send([known.array for known in left.values()]), strict=True):
            graph.publish(slots[slot], graph.inner(sent))
        self._note_real([slots[slot] for slot in left], [known.array for known in left.values()])
        self._is_left = False

    def take_stored(self, pairs: Sequence[tuple[Tensor, Stored]]) -> None:
        """Gives tensors of the state values of a checkpoint; of those that are split only what this process holds."""
        slots = {id(tensor): slot for slot, tensor in read_slots(self.replica).items()}
        named = {slots[id(tensor)]: (tensor, stored) for tensor, stored in pairs if id(tensor) in slots}
        layouts = dict(zip(named, self.runtime.layouts.of_slots(
            list(named), [tensor for tensor, _ in named.values()]), strict=True))
        split = {slot: each for slot, each in named.items() if any(layouts[slot].axes)}
        with torch.no_grad():
            for tensor, stored in pairs:
                if slots.get(id(tensor)) not in split:
                    tensor.copy_(stored.read())
        arrays = self._engine.put_stored(
            [stored for _, stored in split.values()], [tensor.dtype for tensor, _ in split.values()],
            [layouts[slot] for slot in split])
        self._give({slot: tensor for slot, (tensor, _) in split.items()}, dict(zip(split, arrays, strict=True)))

    @contextlib.contextmanager
    def keeping_own(self, *, whole: bool) -> Iterator[None]:
        """Gives each replica its own buffers back at the end of the block: statistics of its rows.

        Args:
          whole: whether all have their mean within the block, which module and checkpoints have.
        """
        if self._engine.num_replicas == 1:
            yield
            return
        self._let_go()
        own = self._own_buffers()
        if whole:
            means = self._engine.put(self._engine.fetch_whole(list(own.values())), [OWN] * len(own))
            self._set_arrays(dict(zip(own, means, strict=True)))
        try:
            yield
        finally:
            self._let_go()
            self._set_arrays(own)

    def statistics(self) -> dict[str, Tensor]:
        """Returns the buffers of all replicas by name, [num_replicas, ...]; nothing where there is one replica."""
        own = self._own_buffers() if self._engine.num_replicas > 1 else {}
        return dict(zip((slot.name for slot in own), self._engine.fetch(list(own.values())), strict=True))

    def set_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Gives each replica its own buffers, unless they are those of another number of replicas."""
        num_replicas = self._engine.num_replicas
        fitting = {slot: statistics[slot.name] for slot, tensor in read_slots(self.replica).items()
                   if slot.kind == "buffer" and slot.name in statistics
                   and statistics[slot.name].shape == (num_replicas, *tensor.shape)} if num_replicas > 1 else {}
        self._set_arrays(dict(zip(fitting, self._engine.put_stacked(list(fitting.values())), strict=True)))

    def _own_buffers(self) -> dict[Slot, Any]:
        buffers = {slot: tensor for slot, tensor in read_slots(self.replica).items() if slot.kind == "buffer"}
        found = zip(buffers, self.arrays_of(list(buffers.values())), strict=True)
        return {slot: array for slot, array in found if array is not None}

    def _let_go(self) -> None:
        if self.holder is not None:
            self.holder.publish()

    def _set_arrays(self, arrays: Mapping[Slot, Any]) -> None:
        slots = read_slots(self.replica)
        self._note_real([slots[slot] for slot in arrays], list(arrays.values()))

    def _send(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies arrays to where steps are traced, a part of them at a time: the host has no second copy of all."""
        sent: list[Tensor] = []
        begin = num_bytes = 0
        for end, array in enumerate(arrays, start=1):
            num_bytes += array.size * array.dtype.itemsize
            if num_bytes >= _MOST_BYTES_SENT or end == len(arrays):
                sent += self.runtime.send(self._engine.fetch_whole(arrays[begin:end]), self.device)
                begin, num_bytes = end, 0
        graph.forget_dtypes(sent)
        return sent

    def _give(self, tensors: Mapping[Slot, Tensor], values: Mapping[Slot, Any] | None = None) -> None:
        """Lets the values of tensors stand in arrays alone: new ones, or those that stand there too."""
        missing = [slot for slot, tensor in tensors.items() if (gone := self._gone.get(slot)) is None
                   or gone.shape != tensor.shape or gone.dtype != tensor.dtype]
        made = self.runtime.make_gone([tensors[slot] for slot in missing], self.device)
        self._gone |= zip(missing, made, strict=True)
        given = list(values.values()) if values is not None else self.arrays_of(list(tensors.values()))
        for (slot, tensor), array in zip(tensors.items(), given, strict=True):
            self._known.pop(graph.tensor_id(tensor), None)
            graph.publish(tensor, graph.inner(self._gone[slot]))
            self._known[graph.tensor_id(tensor)] = _Known(array, None, tensor._version, None)


def forget_step(recording: Recording) -> None:
    """Drops what belongs to a recording's very step; what is kept of it is its form."""
    recording.tensors, recording.values, recording.roots, recording.slots = [], [], [], {}
