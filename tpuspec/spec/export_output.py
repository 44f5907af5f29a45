"""The kinds of output that an exported model can serve."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tpuspec.errors import SpecError, SpecTypeError

DEFAULT_SIGNATURE = "serving_default"
"""Name of the output that is served when none is asked for."""


class ExportOutput:
    """Base of what may stand in `export_outputs`."""


class PredictOutput(ExportOutput):
    """Any tensors by name.

    Args:
      outputs: one tensor, served as 'output', or a dict of name -> tensor [batch, ...].

    Raises:
      SpecTypeError: a value is no tensor or a name is no str.
    """

    def __init__(self, outputs: Tensor | Mapping[str, Tensor]) -> None:
        named = {"output": outputs} if isinstance(outputs, Tensor) else dict(outputs)
        for name, value in named.items():
            if not isinstance(name, str):
                raise SpecTypeError(f"Prediction output key must be a string; got {name!r}.")
            if not isinstance(value, Tensor):
                raise SpecTypeError(f"Prediction output {name!r} must be a Tensor; got {type(value).__name__}.")
        self.outputs: dict[str, Tensor] = named


class ClassificationOutput(ExportOutput):
    """Scores and classes of a classifier, at least one of them.

    Args:
      scores: [batch, num_classes] or [num_classes], floating point.
      classes: [batch, num_classes] or [batch], the class of each score.

    Raises:
      SpecError: neither is given, or scores are not floating point.
      SpecTypeError: a value is no tensor.
    """

    def __init__(self, scores: Tensor | None = None, classes: Tensor | None = None) -> None:
        for name, value in (("scores", scores), ("classes", classes)):
            if value is not None and not isinstance(value, Tensor):
                raise SpecTypeError(f"Classification {name} must be a Tensor; got {type(value).__name__}.")
        if scores is None and classes is None:
            raise SpecError("At least one of scores and classes must be set.")
        if scores is not None and not scores.is_floating_point():
            raise SpecError(f"Classification scores must be floating point; got {scores.dtype}.")
        self.scores, self.classes = scores, classes


class RegressionOutput(ExportOutput):
    """The value of a regression.

    Args:
      value: [batch] or [batch, 1], floating point.

    Raises:
      SpecError: the value is not floating point.
      SpecTypeError: the value is no tensor.
    """

    def __init__(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise SpecTypeError(f"Regression value must be a Tensor; got {type(value).__name__}.")
        if not value.is_floating_point():
            raise SpecError(f"Regression value must be floating point; got {value.dtype}.")
        self.value = value


def check_export_outputs(
        export_outputs: Mapping[str, ExportOutput] | None, predictions: Tensor | Mapping[str, Tensor],
) -> dict[str, ExportOutput]:
    """Returns the outputs to export, among them one under `serving_default`.

    Raises:
      SpecTypeError: not a dict, a name is no str, or a value is no ExportOutput.
      SpecError: several outputs and none of them is the default.

    Source: model_fn_lib.export_outputs_for_mode of TPUEstimator.
    """
    if export_outputs is None:
        return {DEFAULT_SIGNATURE: PredictOutput(predictions)}
    if not isinstance(export_outputs, dict):
        raise SpecTypeError(f"export_outputs must be dict; got {type(export_outputs).__name__}.")
    for name, value in export_outputs.items():
        if not isinstance(name, str):
            raise SpecTypeError(f"Names in export_outputs must be str; got {name!r}.")
        if not isinstance(value, ExportOutput):
            raise SpecTypeError(
                f"Values in export_outputs must be ExportOutput objects; got {type(value).__name__}. "
                "Wrap the tensors: PredictOutput(tensors).")
    if not export_outputs:
        raise SpecError("export_outputs is empty; leave it None to serve the predictions.")
    outputs = dict(export_outputs)
    if len(outputs) == 1 and DEFAULT_SIGNATURE not in outputs:
        outputs[DEFAULT_SIGNATURE] = next(iter(outputs.values()))
    elif DEFAULT_SIGNATURE not in outputs:
        raise SpecError(
            f"Multiple export_outputs were provided ({sorted(outputs)}), but none of them is the default. "
            f"Name one of them {DEFAULT_SIGNATURE!r}.")
    return outputs


def is_default_export(export_outputs: Mapping[str, ExportOutput] | None, predictions: object) -> bool:
    """Whether the outputs are those that check_export_outputs makes of the predictions alone."""
    output = (export_outputs or {}).get(DEFAULT_SIGNATURE)
    if not isinstance(output, PredictOutput) or len(export_outputs or {}) != 1:
        return False
    own = {"output": predictions} if isinstance(predictions, Tensor) else predictions
    return isinstance(own, Mapping) and own.keys() == output.outputs.keys() and all(
        own[name] is tensor for name, tensor in output.outputs.items())
