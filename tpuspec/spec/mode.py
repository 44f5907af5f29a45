"""The three modes in which model_fn is called."""

from __future__ import annotations

from enum import StrEnum


class ModeKeys(StrEnum):
    """Standard names of the modes; the values are TPUEstimator's."""

    TRAIN = "train"
    EVAL = "eval"
    PREDICT = "infer"
