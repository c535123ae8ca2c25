"""`POST /predict` with real bundles: a ResNet-18 whose last layer answers what a test says."""

from __future__ import annotations

import base64
import math
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api import examples
from shared.answers import calibrated
from skipline import schemas

BIAS = [0.0] * 7 + [math.log(8.0), math.log(2.0), 0.0]
"""Of ten classes 7 is eight times, and 8 twice as likely as any other: 8/18, 2/18, and 1/18."""


@pytest.fixture(scope="module")
def settings(sqlite_settings: Any) -> Any:
    """One database is enough here: which checkpoint is meant is the repository's to tell."""
    return sqlite_settings


@pytest.fixture
def trained(api: Any, worker: Any) -> Any:
    """A running job and its worker, with a checkpoint that answers by `BIAS`."""
    job = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10, bias=BIAS)
    return job["id"], attempt


@dataclass
class Held:
    """Forwards that wait to be released, and their sizes, from when they begin."""

    batches: list[int] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    from shared.vision.predictor import Predictor

    held = Held()
    predict = Predictor.predict

    def wait(self: Any, images: Any) -> Any:
        held.batches.append(len(images))
        assert held.released.wait(20)
        return predict(self, images)

    monkeypatch.setattr(Predictor, "predict", wait)
    yield held
    held.released.set()


def checkpoint_ids(api: Any, job_id: str) -> dict[tuple[str, int], str]:
    items = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    return {(item["kind"], item["step"]): item["id"] for item in items}


def test_a_running_jobs_checkpoint_answers(api: Any, trained: Any, png: Any) -> None:
    job_id, _ = trained
    answer = api.predict([png()], model=job_id, top_k=3)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["model"] == {
        "checkpoint_id": checkpoint_ids(api, job_id)["best", 10],
        "job_id": job_id,
        "arch": "resnet18",
        "epoch": 1,
        "step": 10,
        "temperature": None,
        "reject_below": None,
    }
    [prediction] = document["predictions"]
    assert prediction["image"] == "0.png"
    assert [(top["label"], top["index"]) for top in prediction["top"]] == [
        ("7", 7),
        ("8", 8),
        ("0", 0),
    ]
    probabilities = [top["probability"] for top in prediction["top"]]
    assert probabilities == pytest.approx([8 / 18, 2 / 18, 1 / 18], abs=1e-6)
    assert prediction["confidence"] == probabilities[0]
    assert set(document["timing_ms"]) == {"decode", "queue", "load", "forward"}
    assert all(value >= 0 for value in document["timing_ms"].values())
    again = api.predict([png()], model=job_id).json()
    assert again["timing_ms"]["load"] < document["timing_ms"]["load"], "the model is kept"


def test_many_images_are_answered_in_their_order(api: Any, trained: Any, png: Any) -> None:
    job_id, _ = trained
    images = [png(value=value) for value in range(0, 250, 25)]
    predictions = api.predict(images, model=job_id).json()["predictions"]
    assert [p["image"] for p in predictions] == [f"{place}.png" for place in range(10)]
    assert all(len(p["top"]) == 5 for p in predictions)


def test_a_job_means_its_best_checkpoint_and_an_id_that_very_one(
    api: Any, trained: Any, png: Any
) -> None:
    job_id, attempt = trained
    old = checkpoint_ids(api, job_id)["last", 10]
    attempt.checkpoint(20, "best", bias=BIAS[::-1])
    attempt.finish()

    def label(model: str) -> str:
        predictions = api.predict([png()], model=model, top_k=1).json()["predictions"]
        found: str = predictions[0]["top"][0]["label"]
        return found

    assert (label(job_id), label(old)) == ("2", "7")


def test_top_k_is_capped_at_the_number_of_classes(api: Any, trained: Any, png: Any) -> None:
    for top_k, expected in (("1", 1), ("10", 10), ("11", 10), ("9" * 30, 10)):
        [prediction] = api.predict([png()], model=trained[0], top_k=top_k).json()["predictions"]
        assert len({top["index"] for top in prediction["top"]}) == expected
        assert len(prediction["top"]) == expected


def test_a_model_that_is_not_there_or_has_no_checkpoint(
    api: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    for model in ("nothing", "a\x00b", "../x", "x" * 1000, "\N{PILE OF POO}"):
        assert_problem(api.predict([png()], model=model), 404, "model_not_found")
    assert_problem(api.predict([png()], model=api.submit()["id"]), 409, "no_checkpoint_yet")


@pytest.mark.parametrize(
    ("form", "loc"),
    [
        ({"model": "x", "top_k": "0"}, "top_k"),
        ({"model": "x", "top_k": "-1"}, "top_k"),
        ({"model": "x", "top_k": "two"}, "top_k"),
        ({"model": "x", "top_k": "1" * 5000}, "top_k"),
        ({"model": "x", "explain": "perhaps"}, "explain"),
        ({"model": "x", "explains": "true"}, "explains"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_with_its_key(
    sqlite_api: Any, png: Any, form: dict[str, str], loc: str, assert_problem: Callable[..., Any]
) -> None:
    document = assert_problem(sqlite_api.predict([png()], **form), 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == [loc]


def test_a_form_needs_images_that_are_files_and_not_too_many(
    sqlite_api: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    other = sqlite_api.post("/predict", data={"model": "x"}, files=[("picture", ("a", b""))])
    document = assert_problem(other, 422, "invalid_input")
    assert {item["loc"] for item in document["errors"]} == {"image", "picture"}
    text = sqlite_api.post(
        "/predict", data={"model": "x", "image": "a"}, files=[("image", ("a", b""))]
    )
    assert_problem(text, 422, "invalid_input")
    assert_problem(sqlite_api.predict([png()] * 65, model="x"), 400, "malformed_body")
    assert_problem(sqlite_api.predict([png()] * 64, model="x"), 404, "model_not_found")


def test_what_is_no_image_is_refused_by_its_place(
    api: Any, trained: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    for image in (b"", b"just text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png()[:8]):
        response = api.predict([png(), image, png(), image], model=trained[0])
        document = assert_problem(response, 422, "bad_image")
        assert [item["loc"] for item in document["errors"]] == ["image[1]", "image[3]"]


def test_a_truncated_image_is_refused(
    api: Any, trained: Any, assert_problem: Callable[..., Any]
) -> None:
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    assert_problem(api.predict([half], model=trained[0]), 422, "bad_image")


def test_a_bomb_of_144_megapixels_is_refused_by_its_header(
    api: Any, trained: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    bomb = png(12_000, 12_000)
    assert len(bomb) < 200_000
    document = assert_problem(api.predict([png(), bomb], model=trained[0]), 413, "image_too_large")
    assert [item["loc"] for item in document["errors"]] == ["image[1]"]


def test_a_damaged_checkpoint_is_refused_and_not_kept(
    api: Any, trained: Any, worker: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    job_id, attempt = trained
    key = attempt.checkpoint(20, bias=BIAS)
    weights = worker.storage.path(key) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        response = api.predict([png()], model=job_id)
        assert_problem(response, 409, "checkpoint_corrupt")
        assert str(worker.storage.root) not in response.text
    weights.write_bytes(whole)
    assert api.predict([png()], model=job_id).status_code == 200


def test_a_checkpoint_that_vanishes_while_it_is_asked_for_gives_way_to_the_next(
    api: Any, trained: Any, worker: Any, png: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.stored_models import StoredModels

    job_id, attempt = trained
    find = StoredModels.find
    looked_up = []

    def find_then_lose_it(*args: Any) -> Any:
        found = find(*args)
        if not looked_up:
            attempt.checkpoint(20, bias=BIAS)
            shutil.rmtree(worker.storage.path(found.key.storage_key))
        looked_up.append(found.document.step)
        return found

    monkeypatch.setattr(StoredModels, "find", find_then_lose_it)
    answer = api.predict([png()], model=job_id)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["step"] == 20
    assert looked_up == [10, 20]


def test_requests_at_the_same_time_load_a_model_once_and_share_batches(
    api: Any, trained: Any, png: Any, held: Held, wait_for: Callable[..., Any]
) -> None:
    inference = api.server._app.state.services.inference
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(api.predict, [png()], model=trained[0])]
        wait_for(lambda: held.batches == [1], "forward")
        answers += [clients.submit(api.predict, [png()] * 2, model=trained[0]) for _ in range(5)]
        wait_for(lambda: len(inference._waiting) == 5, "full queue")
        held.released.set()
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200] * 6
    assert [len(answer.json()["predictions"]) for answer in found] == [1, 2, 2, 2, 2, 2]
    assert held.batches == [1, 10]
    loads = [answer.json()["timing_ms"]["load"] for answer in found]
    assert sum(load > 1 for load in loads) <= 1


def test_an_explanation_that_fails_leaves_the_answers_before_it(
    api: Any,
    trained: Any,
    png: Any,
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., Any],
    assert_problem: Callable[..., Any],
) -> None:
    from shared.vision.predictor import Predictor

    def fail(self: Any, images: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Predictor, "look", fail)
    inference = api.server._app.state.services.inference
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(api.predict, [png()], model=trained[0])
        wait_for(lambda: held.batches == [1], "forward")
        plain = clients.submit(api.predict, [png()], model=trained[0])
        wait_for(lambda: len(inference._waiting) == 1, "second prediction")
        explained = clients.submit(api.predict, [png()], model=trained[0], explain="true")
        wait_for(lambda: len(inference._waiting) == 2, "third prediction")
        held.released.set()
        assert (first.result().status_code, plain.result().status_code) == (200, 200)
        assert_problem(explained.result(), 500, "internal_error")
    assert held.batches == [1, 2], "the one that failed shared its batch"
    assert api.predict([png()], model=trained[0]).status_code == 200


def test_beyond_so_many_predictions_one_is_told_to_come_back(
    settings: Any,
    start_server: Any,
    trained: Any,
    png: Any,
    held: Held,
    wait_for: Callable[..., Any],
    assert_problem: Callable[..., Any],
) -> None:
    api = start_server(settings.model_copy(update={"max_predict_waiting": 2}))
    inference = api.server._app.state.services.inference
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(api.predict, [png()], model=trained[0]) for _ in range(2)]
        wait_for(lambda: inference._num_places_taken == 2, "second prediction")
        response = api.predict([png()], model=trained[0])
        unread = api.post("/predict", content=b"no image", headers={"Content-Type": "text/plain"})
        held.released.set()
        assert_problem(unread, 429, "too_busy")
        assert_problem(response, 429, "too_busy")
        assert response.headers["retry-after"] == "2"
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert api.predict([png()], model=trained[0]).status_code == 200


def without_times(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json() | {"timing_ms": {}}


def test_a_form_a_document_and_a_bare_image_get_one_answer(
    api: Any, trained: Any, png: Any
) -> None:
    job_id, _ = trained
    image = png()
    form = api.predict([image, image], files="{}", model=job_id, top_k="3")
    encoded = base64.b64encode(image).decode()
    document = {"images": [encoded, encoded], "model": job_id, "top_k": 3}
    assert without_times(api.post("/predict", json=document)) == without_times(form)
    bare = api.post(
        f"/predict?model={job_id}&top_k=3", content=image, headers={"Content-Type": "image/png"}
    )
    assert without_times(bare)["predictions"] == without_times(form)["predictions"][:1]


@pytest.mark.parametrize(
    ("document", "loc"),
    [
        ({}, "images"),
        ({"images": []}, "images"),
        ({"images": "x"}, "images"),
        ({"images": ["x"], "top_k": 0}, "top_k"),
        ({"images": ["x"], "explain": "perhaps"}, "explain"),
        ({"images": ["aGVsbG8=", "not base64"]}, "images[1]"),
        ({"images": ["aGVsbG8="] * 65}, "images"),
        ([], ""),
    ],
)
def test_a_document_that_makes_no_sense_is_refused_with_its_key(
    sqlite_api: Any, document: Any, loc: str, assert_problem: Callable[..., Any]
) -> None:
    problem = assert_problem(sqlite_api.post("/predict", json=document), 422, "invalid_input")
    assert [item["loc"] for item in problem["errors"]] == [loc]


def test_what_is_no_body_of_images_is_refused(
    api: Any, trained: Any, assert_problem: Callable[..., Any]
) -> None:
    def post(query: str, content: bytes, kind: str) -> Any:
        return api.post(f"/predict{query}", content=content, headers={"Content-Type": kind})

    model = f"?model={trained[0]}"
    assert_problem(post(model, b"x", "text/plain"), 415, "unsupported_media_type")
    assert_problem(post(model, b"", "image/png"), 422, "bad_image")
    assert_problem(post(model, b"no image", "image/jpeg"), 422, "bad_image")
    assert_problem(post(model + "&top_k=0", b"x", "image/png"), 422, "invalid_input")
    assert_problem(post(model + "&topk=1", b"x", "image/png"), 422, "invalid_input")
    assert_problem(post(model, b"{", "application/json"), 400, "malformed_json")


def test_an_explanation_is_a_picture_and_features_are_numbers(
    api: Any, trained: Any, png: Any
) -> None:
    job_id, _ = trained
    plain = without_times(api.predict([png(), png()], model=job_id))
    assert [p["explanation"] for p in plain["predictions"]] == [None, None]
    asked = {"model": job_id, "explain": "true", "features": "true"}
    told = without_times(api.predict([png(), png()], **asked))
    for prediction, before in zip(told["predictions"], plain["predictions"], strict=True):
        assert prediction["top"] == before["top"]
        picture = Image.open(BytesIO(base64.b64decode(prediction["explanation"])))
        assert (picture.format, picture.size) == ("PNG", (224, 224))
        assert len(prediction["features"]) == 512
        assert all(value >= 0 for value in prediction["features"])  # behind a ReLU


def test_a_prediction_that_takes_too_long_is_given_up(
    settings: Any,
    start_server: Any,
    trained: Any,
    png: Any,
    held: Held,
    wait_for: Callable[..., Any],
    assert_problem: Callable[..., Any],
) -> None:
    api = start_server(settings)
    state = api.server._app.state
    patient = state.services
    impatient = settings.model_copy(update={"predict_timeout_seconds": 0.5})
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(api.predict, [png()], model=trained[0])
        wait_for(lambda: held.batches == [1], "forward")
        state.services = replace(patient, settings=impatient)
        assert_problem(api.predict([png()] * 3, model=trained[0]), 504, "prediction_timeout")
        assert patient.inference._num_places_taken == 1, "that of the first"
        state.services = patient
        held.released.set()
        assert first.result().status_code == 200
    assert api.predict([png()] * 2, model=trained[0]).status_code == 200
    assert held.batches == [1, 2], "what nobody waits for is not computed"


def test_whoever_leaves_is_dropped_before_the_forward(
    api: Any, trained: Any, png: Any, held: Held, wait_for: Callable[..., Any]
) -> None:
    inference = api.server._app.state.services.inference
    image = png()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(api.predict, [image], model=trained[0])
        wait_for(lambda: held.batches == [1], "forward")
        with socket.create_connection((api.base_url.host, api.base_url.port)) as leaving:
            head = (
                f"POST /predict?model={trained[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Content-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
            )
            leaving.sendall(head.encode() + image)
            wait_for(lambda: len(inference._waiting) == 1, "second prediction")
        wait_for(lambda: inference._num_places_taken == 1, "place of the one that left")
        held.released.set()
        assert first.result().status_code == 200
    assert api.predict([image] * 2, model=trained[0]).status_code == 200
    assert held.batches == [1, 2]


def test_probabilities_are_calibrated_by_the_report_on_the_checkpoint(
    api: Any, trained: Any, png: Any
) -> None:
    job_id, attempt = trained
    ids = checkpoint_ids(api, job_id)
    calibration = {"ece": 0.1, "temperature": 0.5, "calibrated_ece": 0.0, "bins": []}
    report = examples.REPORT | {
        "checkpoint_id": ids["best", 10],
        "calibration": calibration | {"reject_below": 0.8},
    }
    attempt.finish(report=schemas.Report.model_validate(report))
    answer = api.predict([png()], model=job_id, top_k=3).json()
    assert answer["model"]["temperature"] == 0.5
    assert answer["model"]["reject_below"] == 0.8
    # Twice the logits: 8^2, 2^2 and eight times 1, of 76.
    [prediction] = answer["predictions"]
    found = [top["probability"] for top in prediction["top"]]
    assert found == pytest.approx([64 / 76, 4 / 76, 1 / 76], abs=1e-6)
    assert prediction["confidence"] == found[0]
    assert prediction["unknown"] is False  # 0.84
    [other] = api.predict([png()], model=ids["last", 10]).json()["predictions"]
    assert other["confidence"] == pytest.approx(8 / 18, abs=1e-6), "nobody has measured that one"
    assert other["unknown"] is False


def test_an_answer_below_the_threshold_is_unknown(api: Any, trained: Any, png: Any) -> None:
    job_id, attempt = trained
    calibration = {"ece": 0.1, "temperature": 1.0, "calibrated_ece": 0.0, "bins": []}
    report = examples.REPORT | {
        "checkpoint_id": checkpoint_ids(api, job_id)["best", 10],
        "calibration": calibration | {"reject_below": 0.5},
    }
    attempt.finish(report=schemas.Report.model_validate(report))
    [prediction] = api.predict([png()], model=job_id).json()["predictions"]
    assert prediction["confidence"] == pytest.approx(8 / 18, abs=1e-6)
    assert prediction["unknown"] is True


def test_calibrating_is_dividing_the_logits_even_of_extreme_answers() -> None:
    shares = np.array([[1.0, 1e-30, 0.0], [0.5, 0.25, 0.25]], np.float32)
    np.testing.assert_allclose(
        calibrated(shares, 2.0),
        [[1, 1e-15, 0], np.sqrt([0.5, 0.25, 0.25]) / np.sqrt([0.5, 0.25, 0.25]).sum()],
        rtol=1e-5,
    )
    np.testing.assert_allclose(calibrated(shares, 0.05)[0], [1, 0, 0])
    assert calibrated(shares, None) is shares
