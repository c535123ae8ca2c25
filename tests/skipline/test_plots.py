from __future__ import annotations

import threading
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from skipline import plots
from skipline.plots import (
    CURVES,
    CurveName,
    NothingToDraw,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_hardest,
    draw_plot,
    draw_samples,
    title_of,
)
from skipline.schemas import Job, JudgedImage, Metrics, Report
from tests.skipline.replay import job_document, point, report_document

TRAIN, VAL, INK = (0x8D, 0xA0, 0xB3), (0xD1, 0x49, 0x5B), (0x2B, 0x2D, 0x42)


def metrics(**series: list[dict[str, Any]]) -> Metrics:
    return Metrics.model_validate(
        {"job_id": "job-1", "status": "running", "series": series, "next": None}
    )


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    """uint8 [h, w, 3]"""
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def count(picture: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


STEPS = range(1, 41)
TRAINED = metrics(
    train_loss=[point(step, 2 / step) for step in STEPS],
    train_top1=[point(step, 1 - 1 / step) for step in STEPS],
    val_loss=[point(20, 0.3), point(40, 0.2)],
    val_top1=[point(20, 0.8), point(40, 0.9)],
    lr=[point(step, 0.1) for step in STEPS],
)


@pytest.mark.parametrize(
    ("name", "colours"), [("loss", (TRAIN, VAL)), ("accuracy", (TRAIN, VAL)), ("lr", (INK,))]
)
def test_a_curve_is_drawn_in_its_colours(
    name: CurveName, colours: tuple[tuple[int, int, int], ...]
) -> None:
    picture = pixels(draw_plot(name, TRAINED, "resnet18 on digits"))
    assert picture.shape == (600, 960, 3)
    assert all(count(picture, colour) > 100 for colour in colours)


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_needs_a_point_of_its_own(name: CurveName) -> None:
    others = metrics(epoch_seconds=[point(1, 3.0)], **{CURVES[name][0]: []})
    with pytest.raises(NothingToDraw, match=f"no {name} to draw yet"):
        draw_plot(name, others, "x")
    one = metrics(**{CURVES[name][-1]: [point(1, 0.5)]})
    assert pixels(draw_plot(name, one, "x")).shape == (600, 960, 3)


def test_the_curves_side_by_side_can_be_drawn_in_other_formats() -> None:
    assert b"<svg" in draw_curves(TRAINED, "x", format="svg")
    with pytest.raises(ValueError, match="nonsense"):
        draw_curves(TRAINED, "x", format="nonsense")


def report(confusion: npt.NDArray[np.int64], labels: list[str] | None = None) -> Report:
    labels = labels or [f"class {place}" for place in range(len(confusion))]
    row = report_document()["per_class"][0]
    rows = [{**row, "label": label} for label in labels]
    document = report_document() | {"per_class": rows, "confusion": confusion.tolist()}
    return Report.model_validate(document)


BLUE, RED = (0x22, 0x34, 0x4A), (0x8F, 0x22, 0x36)


def test_what_is_right_is_blue_and_what_is_wrong_red() -> None:
    all_right = pixels(draw_confusion(report(np.diag([4, 4])), "x"))
    assert count(all_right, BLUE) > 50_000
    assert count(all_right, RED) == 0
    all_wrong = pixels(draw_confusion(report(np.array([[0, 4], [4, 0]])), "x"))
    assert count(all_wrong, RED) > 50_000
    assert count(all_wrong, BLUE) == 0


def texts_of(monkeypatch: pytest.MonkeyPatch, drawn: Report) -> tuple[list[str], list[str]]:
    """The numbers in the cells, and the labels of the columns."""
    found: list[Any] = []
    draw = plots._file

    def keep(figure: Any, format: str) -> bytes:
        found.append(figure.axes[0])
        return draw(figure, format)

    monkeypatch.setattr(plots, "_file", keep)
    draw_confusion(drawn, "x")
    [axes] = found
    return [text.get_text() for text in axes.texts], [
        label.get_text() for label in axes.get_xticklabels()
    ]


def test_cells_hold_their_numbers_up_to_20_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    confusion = np.diag([1500] * 20)
    confusion[0, 1] = 7
    numbers, labels = texts_of(monkeypatch, report(confusion))
    assert sorted(numbers) == ["1,500"] * 20 + ["7"]
    assert labels == [f"class {place}" for place in range(20)]


def test_beyond_20_classes_there_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, labels = texts_of(monkeypatch, report(np.diag([5] * 21)))
    assert numbers == []
    assert len(labels) == 21


def test_beyond_40_classes_labels_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    _, labels = texts_of(monkeypatch, report(np.diag([5] * 200)))
    assert labels == [f"class {place}" for place in range(0, 200, 5)]


def test_labels_and_titles_are_text_whatever_is_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["$\\frac{$", "猫", "a" * 30, "_^"]
    _, shown = texts_of(monkeypatch, report(np.zeros((4, 4), dtype=int), labels))
    assert shown == ["$\\frac{$", "□", "a" * 19 + "…", "_^"]
    assert draw_plot("lr", TRAINED, "猫 $x$ " * 40).startswith(b"\x89PNG")


def test_small_samples_are_scaled_up_without_a_blur() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    picture = pixels(draw_samples(images, ["a", "b", "c"], "x"))
    for place, image in enumerate(images):
        left = 24 + place * (160 + 14)
        found = picture[62 : 62 + 160, left : left + 160][10::20, 10::20]
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(
    ("num_images", "image_size", "shape"),
    [(1, 32, (268, 480)), (9, 32, (462, 1426)), (40, 64, (722, 1170)), (2, 1024, (268, 480))],
)
def test_samples_are_a_grid_of_at_most_32(
    num_images: int, image_size: int, shape: tuple[int, int]
) -> None:
    images = np.zeros((num_images, image_size, image_size, 3), dtype=np.uint8)
    picture = pixels(draw_samples(images, ["label"] * num_images, "x"))
    assert picture.shape[:2] == shape


def test_a_title_says_what_the_job_is_about() -> None:
    training = Job.model_validate(job_document(name="mine"))
    assert title_of(training) == "mine: resnet18 on digits"
    spec = {"kind": "evaluate", "model": "job-0", "dataset": "pets"}
    evaluation = Job.model_validate(job_document(kind="evaluate", spec=spec))
    assert title_of(evaluation) == "evaluate on pets"


def test_threads_that_draw_at_once_all_draw_in_style() -> None:
    alone = draw_plot("lr", TRAINED, "x")
    drawn: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: drawn.append(draw_plot("lr", TRAINED, "x")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [alone] * 4


def calibrated(accuracy: float) -> Report:
    """A network that is sure of 0.75 in the mean, and right in so many of the cases."""
    part = {"lower": 0.7, "upper": 0.8, "num_images": 8, "confidence": 0.75, "accuracy": accuracy}
    calibration = {"ece": 0.5, "temperature": 2.0, "calibrated_ece": 0.0, "bins": [part]}
    return Report.model_validate(report_document() | {"calibration": calibration})


def test_the_gap_between_sure_and_right_is_drawn() -> None:
    wide = count(pixels(draw_calibration(calibrated(0.25), "A net")), VAL)
    narrow = count(pixels(draw_calibration(calibrated(0.70), "A net")), VAL)
    assert wide > 2 * narrow > 0


def test_a_report_without_calibration_has_nothing_to_draw() -> None:
    with pytest.raises(NothingToDraw):
        draw_calibration(Report.model_validate(report_document()), "A net")


def test_the_hardest_images_say_what_they_were_taken_for() -> None:
    image = np.full((1, 32, 32, 3), (200, 30, 40), np.uint8)
    judged = JudgedImage.model_validate(
        {
            **{"image": "a.png", "split": "val", "index": 0, "label": "cat", "predicted": "cat"},
            **{"confidence": 0.4, "loss": 0.9},
        }
    )
    right = pixels(draw_hardest(image, [judged], "Hardest"))
    wrong = pixels(draw_hardest(image, [judged.model_copy(update={"predicted": "dog"})], "Hardest"))
    assert count(right, (200, 30, 40)) == count(wrong, (200, 30, 40)) > 32 * 32
    assert (right != wrong).any()
