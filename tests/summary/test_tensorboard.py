import io
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.full_disk import full_at
from tpuspec.errors import ConfigError
from tpuspec.summary.tensorboard import TensorBoardWriter


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_are_read_back_with_their_steps(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    for step in range(1, 4):
        writer.scalar("train/loss", torch.tensor([1.0 / step]), step)
    writer.scalar("nan", math.nan, 1)
    writer.close()
    events = read(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert math.isnan(events.Scalars("nan")[0].value)


def test_fault_54_what_a_run_wrote_behind_the_step_it_goes_on_from_is_hidden(tmp_path: Path):
    for after_step, steps in ((0, [1, 2, 3, 4]), (2, [3, 4, 5])):
        writer = TensorBoardWriter(tmp_path, after_step)
        for step in steps:
            writer.scalar("loss", 10 * after_step + step, step)
        writer.close()
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("loss")] == [
        (1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_histogram_and_text_are_read_back(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    writer.histogram("weights", torch.arange(10, dtype=torch.bfloat16), 2)
    writer.text("note", "hello", 2)
    writer.close()
    events = read(tmp_path)
    histogram = events.Histograms("weights")[0]
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (2, 10, 9)
    assert events.Tensors("note/text_summary")[0].tensor_proto.string_val == [b"hello"]


@pytest.mark.parametrize(("shape", "size"), [
    ((4, 6), (6, 4)), ((1, 4, 6), (6, 4)), ((3, 4, 6), (6, 4)), ((4, 4, 6), (6, 4)), ((2, 3, 4, 6), (12, 4))])
def test_images_are_read_back_and_several_make_a_grid(tmp_path: Path, shape: tuple[int, ...], size: tuple[int, int]):
    writer = TensorBoardWriter(tmp_path)
    writer.image("digits", torch.ones(shape), 5)
    writer.close()
    event = read(tmp_path).Images("digits")[0]
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 5
    assert image.size == size
    assert np.asarray(image).min() == 255


@pytest.mark.parametrize(("values", "num"), [
    ([math.nan, math.inf, 1.0], 1), ([1e300, -1e300, 0.0], 3), ([2.0], 1), ([0, 0, 0], 3), ([True, False], 2)])
def test_histogram_of_a_diverged_model_shows_the_finite_numbers(tmp_path: Path, values: list[float], num: int):
    writer = TensorBoardWriter(tmp_path)
    writer.histogram("weights", values, 1)
    writer.close()
    assert read(tmp_path).Histograms("weights")[0].histogram_value.num == num


def test_histogram_without_finite_numbers_writes_nothing(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path / "logs")
    writer.histogram("weights", torch.tensor([math.nan]), 1)
    writer.histogram("weights", torch.zeros(0), 1)
    assert not (tmp_path / "logs").exists()


def test_nothing_is_created_before_the_first_write(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path / "logs")
    writer.flush()
    with pytest.raises(ConfigError, match="takes one number"):
        writer.scalar("loss", torch.zeros(2), 1)
    writer.close()
    assert not (tmp_path / "logs").exists()


def test_flushed_scalars_are_readable_while_the_writer_is_open(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    writer.scalar("loss", 1.0, 1)
    writer.flush()
    assert len(read(tmp_path).Scalars("loss")) == 1
    writer.close()


def test_writers_of_one_folder_one_behind_the_other_write_one_file_without_a_thread(tmp_path: Path):
    threads = threading.active_count()
    for step in range(1, 6):
        writer = TensorBoardWriter(tmp_path)
        for number in (2 * step - 1, 2 * step):
            writer.scalar("loss", 1.0, number)
            assert threading.active_count() == threads
            writer.close()
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert [event.step for event in read(tmp_path).Scalars("loss")] == list(range(1, 11))


def test_writers_of_one_folder_at_a_time_have_a_file_each(tmp_path: Path):
    writers = [TensorBoardWriter(tmp_path) for _ in range(2)]
    for step, writer in enumerate(writers, start=1):
        writer.scalar("loss", 1.0, step)
    for writer in writers:
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [1, 2]


def test_a_file_that_was_deleted_meanwhile_is_made_anew(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    writer.scalar("loss", 1.0, 1)
    writer.close()
    shutil.rmtree(tmp_path)
    writer.scalar("loss", 1.0, 2)
    writer.close()
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [2]


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_was_deleted_is_an_oserror(tmp_path: Path, is_folder: bool):
    writer = TensorBoardWriter(tmp_path / "logs")
    writer.scalar("loss", 1.0, 1)
    if is_folder:
        shutil.rmtree(tmp_path / "logs")
    else:
        next((tmp_path / "logs").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match=r"event file was deleted.*logs"):
        writer.scalar("loss", 1.0, 2)
    writer.close()


def test_a_full_disk_is_an_oserror_at_once_and_what_was_written_before_is_read(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    writer.scalar("loss", 1.0, 1)
    (file,) = tmp_path.iterdir()
    with full_at(file.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        writer.scalar("loss", 1.0, 2)
    writer.scalar("loss", 1.0, 3)
    writer.close()
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [1, 3]


def test_a_disk_that_is_full_from_the_start_is_an_oserror(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    with full_at(10), pytest.raises(OSError, match="File too large"):
        writer.scalar("loss", 1.0, 2)
    writer.close()


def test_writes_from_several_threads_share_one_event_file(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path)
    threads = [threading.Thread(target=writer.scalar, args=(f"loss{i}", 1.0, i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(read(tmp_path).Tags()["scalars"]) == 8
