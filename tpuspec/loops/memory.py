"""Out of memory: the error says which batch size to try."""

from __future__ import annotations

from collections.abc import Mapping

from tpuspec.spec.mode import ModeKeys

# MemoryError without a word, XLA on devices and on the CPU, torch on CUDA and on the CPU.
_TEXTS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "can't allocate memory")
_SETTINGS = {"train": (ModeKeys.TRAIN, "train_batch_size"), "evaluate": (ModeKeys.EVAL, "eval_batch_size"),
             "predict": (ModeKeys.PREDICT, "predict_batch_size")}


_NOTE = "The memory is full"


def explain_out_of_memory(error: BaseException, verb: str, batch_sizes: Mapping[ModeKeys, int | None],
                          num_replicas: int) -> None:
    """Adds a note to an error that says that the memory is full; to others nothing.

    Args:
      error: what ended a call.
      verb: 'train', 'evaluate' or 'predict'.
      batch_sizes: the global ones, None where the input's own are taken.
      num_replicas: a batch is divided by.
    """
    is_told = any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ()))  # by a call within this one
    if is_told or verb not in _SETTINGS or not _is_out_of_memory(error):
        return
    mode, setting = _SETTINGS[verb]
    size = batch_sizes.get(mode)
    smaller = "" if size is None else f"={size}, to {max(size // 2 // num_replicas, 1) * num_replicas} for example"
    also = ", or let minimize(accumulate_steps=...) add up the gradients of smaller batches" if verb == "train" else ""
    error.add_note(f"{_NOTE}: lower {setting}{smaller}{also}.")


def _is_out_of_memory(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, MemoryError) or any(text in str(error) for text in _TEXTS)
                                  or _is_out_of_memory(error.__cause__))
