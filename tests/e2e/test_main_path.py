"""One job from its spec to a prediction, over HTTP, on both stacks."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import EndEvent, JobStatus, MetricEvent
from tests.e2e.conftest import Service, bring_in, on_sqlite, running_service, tiny_spec, wait_for


def test_a_job_is_posted_watched_evaluated_and_served(service: Service, stripes: Path) -> None:
    with service.client() as client:
        dataset_id = bring_in(client, stripes)
        job = client.submit(tiny_spec(epochs=6))
        assert job.status in (JobStatus.queued, JobStatus.running)
        assert job.spec["scheduler"] == {"name": "cosine", "warmup_epochs": 1.0, "min_lr": 0.0}

        # Watched while it trains, cut off, and taken up where the cut was.
        head = list(islice(client.stream_metrics(job.id), 5))
        numbers = [event.id for event in head if isinstance(event, MetricEvent)]
        assert numbers == [1, 2, 3, 4, 5]
        wait_for(lambda: client.checkpoints(job.id), "checkpoint")
        image = stripes / "test" / "down" / "000.png"
        early = client.predict([image], model=job.id)
        assert early.model.job_id == job.id

        tail = list(client.stream_metrics(job.id, last_event_id=5))
        assert isinstance(tail[-1], EndEvent)
        assert tail[-1].status is JobStatus.succeeded
        points = [event for event in head + tail if isinstance(event, MetricEvent)]
        assert [point.id for point in points] == list(range(1, len(points) + 1))
        assert Counter((point.name, point.step) for point in points).most_common(1)[0][1] == 1
        # 48 images in batches of 8 are 6 steps an epoch; every 2 steps a point.
        assert [p.step for p in points if p.name == "train_loss"] == list(range(2, 37, 2))
        assert [(p.epoch, p.step) for p in points if p.name == "val_top1"] == [
            (epoch, 6 * epoch) for epoch in range(1, 7)
        ]

        stored = client.metrics(job.id)
        assert {name: len(series) for name, series in stored.series.items()} == Counter(
            point.name for point in points
        )

        done = client.job(job.id)
        assert done.status is JobStatus.succeeded
        assert (done.attempt, done.error) == (1, None)
        assert done.progress is not None
        assert (done.progress.step, done.progress.epoch) == (36, 6)
        report = client.report(job.id)
        assert (report.selected_on, report.split, report.num_samples) == ("test", "test", 16)
        assert [sum(row) for row in report.confusion] == [8, 8]
        assert report.top1 >= 0.9
        assert done.result is not None
        assert done.result["top1"] == report.top1
        best = min(p.value for p in points if p.name == "val_loss")
        assert report.loss == pytest.approx(best, rel=1e-4)

        # The whole test split, predicted, gives the report's top-1.
        files = sorted((stripes / "test").rglob("*.png"))
        answer = client.predict(files, model=job.id, top_k=2)
        hits = [
            prediction.top[0].label == file.parent.name
            for prediction, file in zip(answer.predictions, files, strict=True)
        ]
        assert sum(hits) / len(hits) == report.top1
        for prediction in answer.predictions:
            assert sum(entry.probability for entry in prediction.top) == pytest.approx(1, abs=1e-4)

        # And so they are as a job, from the stored dataset and from the folder.
        expected = {
            file.relative_to(stripes / "test").as_posix(): prediction
            for file, prediction in zip(files, answer.predictions, strict=True)
        }
        for batch in (
            client.predict_all(dataset=dataset_id, split="test", model=job.id),
            client.predict_all(stripes / "test", model=job.id),
        ):
            batch = client.wait(batch.id)
            assert batch.status is JobStatus.succeeded, batch.error
            found = client.predictions(batch.id)
            assert found.model == answer.model
            assert len(found.predictions) == len(files)
            for row in found.predictions:
                one = expected[row.image.removeprefix("test/")]
                assert [entry.label for entry in row.top] == [entry.label for entry in one.top]
                assert row.confidence == pytest.approx(one.confidence, abs=1e-5)
                assert row.unknown is one.unknown

        evaluation = client.wait(client.evaluate(model=job.id, dataset=dataset_id).id)
        assert evaluation.status is JobStatus.succeeded, evaluation.error
        assert client.report(evaluation.id).confusion == report.confusion


@on_sqlite
def test_a_model_moves_to_another_skipline(shared_service: Service, tmp_path: Path) -> None:
    files = sorted((shared_service.home.parent / "stripes" / "test").rglob("*.png"))
    path = tmp_path / "model.safetensors"
    with shared_service.client() as client:
        job = client.wait(client.submit(tiny_spec(epochs=2)).id)
        expected = client.predict(files, model=job.id)
        report = client.report(job.id)
        client.export_model(path, job.id)
    (tmp_path / "other").mkdir()
    with running_service(tmp_path / "other", {}) as other, other.client() as client:
        taken = client.wait(client.import_model(path).id)
        assert taken.status is JobStatus.succeeded, taken.error
        found = client.predict(files, model=taken.id)
        # What they are called differs, and no bit of what they say.
        assert found.predictions == expected.predictions
        assert found.model.temperature == expected.model.temperature
        assert client.report(taken.id).confusion == report.confusion
        client.promote(taken.id)
        assert "resnet18" in client.model_card()


@on_sqlite
def test_jobs_wait_their_turn_and_can_be_cancelled(shared_service: Service) -> None:
    service = shared_service
    with service.client() as client:
        first = client.submit(tiny_spec(epochs=10_000))
        second = client.submit(tiny_spec())
        third = client.submit(tiny_spec())
        wait_for(lambda: client.job(first.id).status is JobStatus.running, "running job")
        assert client.job(second.id).queue_position == 1
        assert client.job(third.id).queue_position == 2
        assert client.cancel(second.id).status is JobStatus.cancelled
        assert client.job(third.id).queue_position == 1

        wait_for(lambda: client.metrics(first.id).series, "first metrics")
        [trainer] = service.trainers(first)
        assert client.cancel(first.id).status is JobStatus.cancelling
        assert client.wait(first.id).status is JobStatus.cancelled
        wait_for(lambda: trainer not in service.processes("worker.runner"), "end of the trainer")
        with pytest.raises(SkiplineError) as refused:
            client.cancel(client.wait(third.id).id)
        assert (refused.value.status, refused.value.code) == (409, "illegal_transition")


def test_a_training_that_fails_says_why(shared_service: Service) -> None:
    with shared_service.client() as client:
        job = client.submit(tiny_spec(optimizer={"lr": 1000, "momentum": 0.99}, epochs=50))
        ended = client.wait(job.id)
        assert ended.status is JobStatus.failed
        assert ended.attempt == 1
        assert ended.error is not None
        assert ended.error.code == "nan_loss"
        assert "optimizer.lr" in ended.error.hint
        with pytest.raises(SkiplineError) as missing:
            client.report(job.id)
        assert missing.value.status == 404

        broken = shared_service.home.parent / "broken"
        for label in ("a", "b"):
            (broken / label).mkdir(parents=True)
            (broken / label / "x.png").write_bytes(b"no image")
        ended = client.wait(client.add_dataset(path=broken).id)
        assert ended.status is JobStatus.failed
        assert ended.error is not None
        assert ended.error.code == "no_readable_images"


@on_sqlite
def test_what_has_no_checkpoint_cannot_predict(shared_service: Service) -> None:
    stripes = shared_service.home.parent / "stripes"
    image = stripes / "test" / "down" / "000.png"
    with shared_service.client() as client:
        ingest = client.wait(client.add_dataset(path=stripes, name="stripes").id)
        for model, status, code in (
            (ingest.id, 409, "no_checkpoint_yet"),
            ("nobody", 404, "model_not_found"),
        ):
            with pytest.raises(SkiplineError) as refused:
                client.predict([image], model=model)
            assert (refused.value.status, refused.value.code) == (status, code)


@pytest.mark.parametrize("stack", [{}])
def test_a_service_answers_only_who_has_the_key(service: Service) -> None:
    service.stop()
    service.environment["SKIPLINE_API_KEY"] = "a-long-secret"
    with Skipline(service.url, api_key="a-long-secret") as client:
        service.client = lambda: Skipline(service.url, api_key="a-long-secret")  # type: ignore[method-assign]
        service.start()
        assert client.datasets().items == []
    with Skipline(service.url, api_key="wrong") as client:
        with pytest.raises(SkiplineError) as refused:
            client.datasets()
        assert refused.value.status == 401
        assert client.ready().status == "ready"
