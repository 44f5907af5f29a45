"""Collectives of torch.distributed that give up when a host has failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tpuspec.errors import HostFailureError
from tpuspec.hosts import tree_codec
from tpuspec.hosts.health import Health

_SLOT_BYTES = 256
_SLICE = timedelta(seconds=0.5)
_DIGEST_BYTES = 8


class Collectives:
    """One group of processes, on host tensors by gloo and on the GPU's by nccl.

    Args:
      host_index: this process.
      num_hosts: all of them.
      health: says who has failed.
      control: a ProcessGroupGloo. Every root below is process 0, the default of its options.
      device_group: a ProcessGroupNCCL; None without GPUs.
    """

    def __init__(self, *, host_index: int, num_hosts: int, health: Health, control: Any,
                 device_group: Any = None) -> None:
        self.host_index, self.num_hosts = host_index, num_hosts
        self._health = health
        self._control, self._device_group = control, device_group
        # Works that were given up: their memory must outlive them.
        self._abandoned: list[Any] = []

    def exchange(self, value: Any, name: str) -> list[Any]:
        """Returns every host's value; see Coordinator.exchange."""
        data = json.dumps(value).encode()
        digest = hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest()
        head = digest + len(data).to_bytes(4, "little")
        slots = self._slots(head + data if len(head + data) <= _SLOT_BYTES else head, _SLOT_BYTES, name)
        heads = [(slot[:_DIGEST_BYTES], int.from_bytes(slot[_DIGEST_BYTES:_DIGEST_BYTES + 4], "little"))
                 for slot in slots]
        parted = [host for host, (other, _) in enumerate(heads) if other != digest]
        if parted:
            raise HostFailureError(
                f"the hosts have parted: host {self.host_index} asks for {name!r}, host {parted[0]} for something "
                "else. Every host must make the same calls of train, evaluate and predict, with the same settings.")
        longest = max(size for _, size in heads)
        start = _DIGEST_BYTES + 4
        if start + longest > _SLOT_BYTES:
            slots, start = self._slots(data, longest, name), 0
        return [json.loads(slot[start:start + size]) for slot, (_, size) in zip(slots, heads, strict=True)]

    def _slots(self, data: bytes, size: int, name: str) -> list[bytes]:
        # A sum over slots of which each host fills its own: a third of gloo's all_gather for these few bytes.
        size = max(size, 1)
        buffer = torch.zeros(self.num_hosts * size, dtype=torch.uint8)
        begin = self.host_index * size
        if data:
            buffer[begin:begin + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.all_reduce(buffer, f"agree on {name}")
        joined = buffer.numpy().tobytes()
        return [joined[i * size:(i + 1) * size] for i in range(self.num_hosts)]

    def all_reduce(self, tensor: Tensor, what: str = "reduce gradients") -> None:
        """Sums a tensor over the hosts, in place."""
        self._wait(lambda group: group.allreduce([tensor]), tensor, what)

    def broadcast(self, tensor: Tensor, what: str = "take the chief's state") -> None:
        """Makes a tensor the chief's, in place."""
        self._wait(lambda group: group.broadcast([tensor]), tensor, what)

    def gather(self, tensor: Tensor, what: str = "bring host tensors to the chief") -> list[Tensor] | None:
        """Returns every host's tensor on the chief, None on the others; all have one shape and dtype."""
        parts = [[torch.empty_like(tensor) for _ in range(self.num_hosts)]] if self.host_index == 0 else []
        self._wait(lambda group: group.gather(parts, [tensor]), tensor, what)
        return parts[0] if parts else None

    def scatter(self, parts: Sequence[Tensor] | None, out: Tensor, what: str = "deal out the batch") -> Tensor:
        """Fills `out` with this host's part of the chief's."""
        self._wait(lambda group: group.scatter([out], [] if parts is None else [list(parts)]), out, what)
        return out

    def share(self, tree: Any) -> Any:
        """Returns the chief's tree on every host; see Coordinator.share."""
        skeleton, tensors = tree_codec.encode(tree) if self.host_index == 0 else (None, [])
        skeleton = self.exchange(skeleton, "the chief's tree")[0]
        specs = tree_codec.tensor_specs(skeleton)
        if not specs:
            return tree_codec.decode(skeleton, [])
        size, cpu = tree_codec.num_bytes(specs), torch.device("cpu")
        flat = (tree_codec.to_bytes(tensors, cpu) if self.host_index == 0
                else torch.empty(size, dtype=torch.uint8))
        self.broadcast(flat)
        return tree if self.host_index == 0 else tree_codec.decode(skeleton, tree_codec.from_bytes(flat, specs))

    def collect(self, tree: Any) -> list[Any] | None:
        """Returns every host's tree on the chief; see Coordinator.collect."""
        skeleton, tensors = tree_codec.encode(tree)
        skeletons = self.exchange(skeleton, "a tree of every host")
        specs = [tree_codec.tensor_specs(other) for other in skeletons]
        if any(other != specs[0] for other in specs):
            raise HostFailureError(f"the hosts hold tensors of different shapes: {specs[0]} on the chief, {specs}.")
        parts = self.gather(tree_codec.to_bytes(tensors, torch.device("cpu")))
        if parts is None:
            return None
        return [tree_codec.decode(other, tree_codec.from_bytes(part, specs[0]))
                for other, part in zip(skeletons, parts, strict=True)]

    def deal(self, trees: Sequence[Any] | None) -> Any:
        """Returns this host's part of the chief's trees; see Coordinator.deal."""
        encoded = [] if trees is None else [tree_codec.encode(tree) for tree in trees]
        skeleton = self.exchange(encoded[0][0] if encoded else None, "the nesting of a batch")[0]
        specs = tree_codec.tensor_specs(skeleton)
        parts = [tree_codec.to_bytes(tensors, torch.device("cpu")) for _, tensors in encoded] or None
        out = torch.empty(tree_codec.num_bytes(specs), dtype=torch.uint8)
        self.scatter(parts, out)
        return tree_codec.decode(skeleton, tree_codec.from_bytes(out, specs))

    def _wait(self, start: Any, tensor: Tensor, what: str) -> None:
        self._health.check()
        if tensor.device.type == "cuda":
            assert self._device_group is not None, "made with the GPU's backend"
            try:
                start(self._device_group).wait()  # the stream waits, not the host
            except RuntimeError as error:
                raise self._health.explain(error, what) from error
            return
        try:
            work = start(self._control)
        except RuntimeError as error:
            raise self._health.explain(error, what) from error
        # In slices: nothing can interrupt gloo while it waits for a host that is stopped.
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if self._health.has_failed:
                    self._abandoned.append((work, tensor))
                    raise self._health.error() from error
                if not _is_timeout(error):
                    self._abandoned.append((work, tensor))
                    raise self._health.explain(error, what) from error


def _is_timeout(error: RuntimeError) -> bool:
    return str(error).startswith("Operation timed out")
