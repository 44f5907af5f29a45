"""ServingInputReceiver: an example of what a server receives, and how model_fn's features come from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.functions import argument_names

Features = Tensor | Mapping[Any, Tensor]
SINGLE_RECEIVER, SINGLE_FEATURE = "input", "feature"
_SERVING_INPUT_ARGUMENTS = ("params",)


@dataclass(frozen=True, slots=True)
class ServingInputReceiver:
    """What a serving_input_fn returns.

    Attributes:
      features: an example of model_fn's features, one tensor [batch, ...] or a dict of them; or a function of the
        receiver tensors that computes them, which becomes part of the exported program.
      receiver_tensors: an example of what the server receives, one tensor, then called 'input', or a dict of name ->
        tensor [batch, ...]; None receives the features themselves.
      fixed_batch: whether the program takes exactly as many rows as the example has, and not any number.

    Raises:
      ConfigError: nothing is given, a name or a value is of the wrong kind, or rows are not on axis 0.

    Source: tf.estimator.export.ServingInputReceiver.
    """

    features: Features | Callable[[Any], Features]
    receiver_tensors: Features | None = None
    fixed_batch: bool = False

    def __post_init__(self) -> None:
        if self.features is None:
            raise ConfigError("features must be defined: an example tensor, a dict of them, or a function of "
                              "receiver_tensors.")
        is_function = callable(self.features) and not isinstance(self.features, Tensor)
        if is_function and self.receiver_tensors is None:
            raise ConfigError("features is a function of receiver_tensors, and there are none. Give an example of what "
                              "the server receives, receiver_tensors={'image': tensor}.")
        if not is_function:
            _check_tensors("feature", self.features, SINGLE_FEATURE, (str, int))
            if self.receiver_tensors is not None and self.receiver_tensors is not self.features:
                raise ConfigError("features and receiver_tensors are both tensors, which does not say how the ones "
                                  "come from the others. Make features a function of receiver_tensors.")
        _check_tensors("receiver_tensors", self.received, SINGLE_RECEIVER, (str,))
        sizes = {name: tensor.shape[0] for name, tensor in tensors_by_name(self.received).items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ConfigError("receiver_tensors must have the same number of rows on axis 0, at least one; got "
                              f"{sizes}.")

    @property
    def received(self) -> Features:
        """The example of what the server receives."""
        return self.features if self.receiver_tensors is None else self.receiver_tensors  # type: ignore[return-value]

    def compute_features(self, received: Any) -> Any:
        """Returns the features of what was received.

        Raises:
          ConfigError: the function returned something else than tensors.
        """
        if not callable(self.features) or isinstance(self.features, Tensor):
            return received
        features = self.features(received)
        if features is None:
            raise ConfigError("features must be defined; the function of receiver_tensors returned None.")
        _check_tensors("feature", features, SINGLE_FEATURE, (str, int))
        return features


def tensors_by_name(tensors: Features) -> dict[str, Tensor]:
    """Returns what is received by name; a single tensor is called 'input'."""
    return {SINGLE_RECEIVER: tensors} if isinstance(tensors, Tensor) else dict(tensors)


def check_serving_input_fn(serving_input_fn: Any) -> Callable[..., Any]:
    """Returns the function that makes a ServingInputReceiver; it is not called.

    Raises:
      ConfigTypeError: no function.
      ConfigError: it is missing, or takes something else than params.
    """
    if serving_input_fn is None:
        raise ConfigError("An input_receiver_fn must be defined: serving_input_fn is None. Pass a function that "
                          "returns a ServingInputReceiver.")
    if not callable(serving_input_fn):
        raise ConfigTypeError("serving_input_fn must be a function that returns a ServingInputReceiver; got "
                              f"{type(serving_input_fn).__name__}.")
    unknown = [name for name in argument_names(serving_input_fn) if name not in _SERVING_INPUT_ARGUMENTS]
    if unknown:
        raise ConfigError(f"serving_input_fn may take params, and nothing else; it takes {unknown}.")
    return serving_input_fn


def _check_tensors(what: str, tensors: Any, single: str, key_types: tuple[type, ...]) -> None:
    named = {single: tensors} if isinstance(tensors, Tensor) else tensors
    if not isinstance(named, Mapping) or not named:
        raise ConfigError(f"{what} must be a tensor or a dict of tensors; got {type(tensors).__name__}.")
    for key, value in named.items():
        if not isinstance(key, key_types):
            kinds = " or ".join(kind.__name__ for kind in key_types)
            raise ConfigError(f"{what} keys must be {kinds}; got {key!r}.")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ConfigError(f"{what} {key!r} must be a Tensor (dense); got {type(value).__name__}.")
        if value.ndim == 0:
            raise ConfigError(f"{what} {key!r} must have its rows on axis 0, [batch, ...]; got a scalar.")
