"""The benchmarks: tiny runs of each, and the arithmetic of what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from api.app import create_app
from api.server import Server
from benchmarks import batching, cluster, fast_cifar, figures, ingest, queue, serving, training
from benchmarks.baselines import images, ours, published, timm_script, torchvision_reference
from benchmarks.baselines.problem import Turn
from shared import lifecycle, repository
from shared.database import Database
from shared.lifecycle import Capacity
from skipline.recipes import RECIPES
from skipline.schemas import JobStatus
from skipline.specs import SGD, Adam, IngestSpec

ALONE = ["--workers", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False


def refusal(main: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a wrong command line."""
    with pytest.raises(SystemExit) as stopped:
        main(words)  # type: ignore[operator]
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


# --------------------------------------------------------------------------------- training epochs


def test_every_contender_trains_once_a_round_and_the_figures_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["--images", "8", "--batch-size", "4", "--rounds", "2", "--json", str(file), *ALONE]
    code = training.main(words)

    document = json.loads(file.read_text())["systems"]["cifar10"]
    assert (document["num_images"], document["batch_size"]) == (8, 4)
    rates = document["images_per_second"]
    names = {"ours fp32", "ours auto", "published", "bare fp32", "bare bf16", "torchvision"}
    assert names <= set(rates)
    for name, taken in rates.items():
        assert len(taken) == 2
        assert document["medians"][name] == pytest.approx(sum(taken) / 2)
    fp32 = document["goals"][0]
    assert fp32["ratio"] == document["ratios_to_published"]["ours fp32"]
    assert code == (0 if all(goal["is_met"] for goal in document["goals"]) else 1)
    assert f"ours fp32 / published: {fp32['ratio']:.3f}, at least 1.15" in capsys.readouterr().out


def turns(**seconds: float) -> dict[str, list[Turn]]:
    return {name.replace("_", " "): [Turn(100, value)] for name, value in seconds.items()}


def test_a_goal_is_missed_by_a_hair_and_met_on_the_line() -> None:
    document = training.summarize(
        turns(ours_fp32=8, ours_auto=4, published=10, bare_fp32=7.76, bare_bf16=3.8),
        packing_seconds=2,
        auto_precision="bf16",
    )
    ratios = {(goal["contender"], goal["other"]): goal["ratio"] for goal in document["goals"]}
    assert ratios == {
        ("ours fp32", "published"): pytest.approx(1.25),
        ("ours auto", "published"): pytest.approx(2.5),
        ("ours fp32", "bare fp32"): pytest.approx(0.97),
        ("ours auto", "bare bf16"): pytest.approx(0.95),
    }
    assert [goal["is_met"] for goal in document["goals"]] == [True, True, True, False]
    assert document["ratios_with_packing"]["ours fp32"] == pytest.approx(1.0)
    assert document["ratios_with_packing"]["ours auto"] == pytest.approx(10 / 6)


def test_ours_at_auto_is_held_against_the_bare_loop_of_the_precision_that_it_chose() -> None:
    assert [goal.other for goal in training.goals("fp32")] == [
        "published",
        "published",
        "bare fp32",
        "bare fp32",
    ]


def test_contenders_take_turns_back_and_forth() -> None:
    order: list[str] = []

    def run(name: str) -> Turn:
        order.append(name)
        return Turn(1, 1.0)

    taken = training.take_turns({name: lambda name=name: run(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert order == list("abccba")
    assert {name: len(each) for name, each in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_accuracy_is_compared_after_the_same_epochs_from_the_same_weights(tmp_path: Path) -> None:
    data, file = tmp_path / "data", tmp_path / "figures.json"
    images.make_noise(data, image_size=64, num_classes=3, num_train=12)
    words = ["--system", "tinyimagenet", "--data", str(data), "--accuracy", "--json", str(file)]
    code = training.main([*words, "--epochs", "1", "--classes", "2", "--batch-size", "4", *ALONE])

    document = json.loads(file.read_text())["systems"]["tinyimagenet"]
    assert document["num_images"] == {"train": 8, "val": 2}
    assert (document["num_classes"], document["num_epochs"]) == (2, 1)
    assert {document["ours_val_top1"], document["published_val_top1"]} <= {0.0, 0.5, 1.0}
    assert code == int(document["ours_val_top1"] < document["published_val_top1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--data", ".", "--system", "all"], "--data holds the images of one system"),
        (["--full"], "--full needs --data"),
        (["--accuracy"], "--accuracy is for --system tinyimagenet"),
        (["--images", "0"], "argument --images: invalid positive value: '0'"),
        (["--images", "9", "--batch-size", "10"], "--images: 9 are less than a batch of 10"),
    ],
)
def test_wrong_usage_is_told(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(training.main, words, capsys).startswith(said)


def test_images_that_are_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no images in train/<class>" in refusal(training.main, ["--data", str(tmp_path)], capsys)
    images.make_noise(tmp_path, image_size=32, num_classes=2, num_train=4)
    words = ["--data", str(tmp_path), "--images", "5"]
    assert refusal(training.main, words, capsys) == "--images 5: there are 4"
    images.make_noise(tmp_path / "large", image_size=64, num_classes=2, num_train=4)
    words = ["--data", str(tmp_path / "large"), "--images", "4", "--batch-size", "2"]
    assert "is made for images of 32 px" in refusal(training.main, words, capsys)


# -------------------------------------------------------------------------------------- the parts


def test_the_published_vgg_starts_from_our_weights(tmp_path: Path) -> None:
    images.make_noise(tmp_path / "noise", image_size=64, num_classes=2, num_train=2)
    arguments = training.parser().parse_args(
        ["--data", str(tmp_path / "noise"), "--images", "2", "--batch-size", "2", *ALONE]
    )
    system = training.SYSTEMS["tinyimagenet"]
    training.lay_out(arguments, system, tmp_path)
    problem = training.enter(arguments, system, tmp_path).problem
    theirs, ours_model = published.network(problem), problem.new_model()
    pairs = list(zip(theirs.parameters(), ours_model.parameters(), strict=True))
    assert len(pairs) == 2 * (10 + 4)
    assert all(torch.equal(a, b) for a, b in pairs)
    logits, features = theirs(torch.zeros(3, 3, 64, 64))
    assert (logits.shape, features.shape) == ((3, 2), (3, 512, 4, 4))
    assert theirs.training


def test_the_reference_counts_right_answers_and_those_among_five() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    acc1, acc5 = torchvision_reference.accuracies(logits, torch.tensor([0, 4, 5]))
    assert acc1.item() == pytest.approx(100 / 3)
    assert acc5.item() == pytest.approx(200 / 3)


def test_timms_optimizers_are_named_as_timm_names_them() -> None:
    sgd = SGD(lr=0.1, nesterov=False, weight_decay=1e-4)
    expected = {"opt": "momentum", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert timm_script.optimizer_options(sgd) == expected
    assert timm_script.optimizer_options(SGD(nesterov=True))["opt"] == "nesterov"
    adam = {"opt": "adam", "lr": 1e-4, "weight_decay": 0.0}
    assert timm_script.optimizer_options(Adam(lr=1e-4)) == adam


def test_images_are_dealt_evenly_over_the_classes() -> None:
    files = {"a": [Path("1"), Path("2"), Path("3")], "b": [Path("4")], "c": [Path("5"), Path("6")]}
    assert images.take(files, 5) == {
        "a": [Path("1"), Path("2")],
        "b": [Path("4")],
        "c": [Path("5"), Path("6")],
    }


def test_tinyimagenets_own_layout_is_read(tmp_path: Path) -> None:
    for path in ("train/n02/images/x.JPEG", "train/n01/images/y.JPEG", "val/images/v.JPEG"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "train/n01/n01_boxes.txt").touch()
    (tmp_path / "val/val_annotations.txt").write_text("v.JPEG\tn02\t0\t0\t9\t9\n")
    assert list(images.images_of(tmp_path, "train").items()) == [
        ("n01", [tmp_path / "train/n01/images/y.JPEG"]),
        ("n02", [tmp_path / "train/n02/images/x.JPEG"]),
    ]
    assert images.validation_images(tmp_path) == {"n02": [tmp_path / "val/images/v.JPEG"]}


def test_a_benchmarks_recipe_differs_in_nothing_but_when_it_stores(tmp_path: Path) -> None:
    images.make_noise(tmp_path, image_size=32, num_classes=2, num_train=2)
    source = IngestSpec(path=str(tmp_path))
    data = ours.bring_in(source, 32, tmp_path / "home", ours.folder_settings(tmp_path, 1))
    spec = ours.recipe_spec("cifar10_resnet18_fast94", data)
    recipe = RECIPES["cifar10_resnet18_fast94"].spec
    assert (spec.epochs, spec.batch_size) == (recipe["epochs"], recipe["batch_size"])
    assert spec.checkpoint.every_epochs == recipe["checkpoint"]["every_epochs"]
    assert spec.checkpoint.every_minutes == 10_000
    mean, std = data.record.channel_mean, data.record.channel_std
    preprocessing = ours.preprocessing_of(spec, data.record)
    assert preprocessing.channel_mean == tuple(mean)
    assert preprocessing.channel_std == tuple(std)


def test_a_stopwatch_leaves_validation_and_checkpoints_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 6.0, 8.0, 20.0, 23.0, 30.0])
    monkeypatch.setattr(ours, "synchronized_time", lambda device: next(clock))
    stopwatch = ours.Stopwatch(torch.device("cpu"))  # 0
    stopwatch.metrics({"train_loss": 2.0}, step=1, epoch=1)  # 5: a window within the epoch
    stopwatch.metrics({"train_loss": 1.0}, step=2, epoch=1)  # 6: its end
    stopwatch.metrics({"val_top1": 0.25}, step=2, epoch=1)  # 8
    stopwatch.save_checkpoint(None)  # type: ignore[arg-type]  # 20
    stopwatch.metrics({"train_loss": 1.0}, step=4, epoch=2)  # 23
    stopwatch.metrics({"val_top1": 0.5}, step=4, epoch=2)  # 30
    assert stopwatch.epochs == [ours.Epoch(6.0, 0.25), ours.Epoch(3.0, 0.5)]


# ------------------------------------------------------------------------------------ fast CIFAR


def test_seeds_are_trained_once_and_their_mean_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    images.make_noise(data, image_size=32, num_classes=2, num_train=8)
    words = ["--data", str(data), "--results", str(results), "--threads", "1"]
    words += ["--epochs-run", "1", "--seeds"]
    assert fast_cifar.main([*words, "0"]) == 0
    assert fast_cifar.main([*words, "0", "1"]) == 0
    assert "seed 0: done before" in capsys.readouterr().out

    [file] = results.glob("*.json")
    assert file.name.startswith("cifar10_resnet18_fast94-")
    assert file.name.endswith("-first-1.json")
    document = json.loads(file.read_text())
    assert (document["epochs"], document["epochs_run"], document["batch_size"]) == (14, 1, 512)
    assert set(document["runs"]) == {"0", "1"}
    for run in document["runs"].values():
        assert run["curve"] == [run["top1"]]
        assert run["first_step_seconds"] > 0
    header, _, row = file.with_suffix(".md").read_text().splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (cells["epochs"], cells["seeds"]) == ("first 1 of 14", "0, 1")

    document["dataset_hash"] = "another"
    file.write_text(json.dumps(document))
    said = refusal(fast_cifar.main, [*words, "2"], capsys)
    assert said == f"{file.name} holds runs of another dataset_hash: move it away"


def test_mean_and_standard_deviation_are_those_of_the_sample() -> None:
    assert fast_cifar.spread([94.0, 95.0, 96.0], " %", 2) == "95.00 ± 1.00 %"
    assert fast_cifar.spread([7.25], " s", 1) == "7.2 s"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--epochs-run", "0"], "--epochs-run: at least 1"),
        (["--recipe", "cifar10_resnet18"], "argument --recipe: invalid choice"),
        (["--data", "."], "There are no images in class folders"),
    ],
)
def test_wrong_usage_of_fast_cifar_is_told(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(fast_cifar.main, words, capsys).startswith(said)


def test_no_more_epochs_are_run_than_the_schedule_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images.make_noise(tmp_path, image_size=32, num_classes=2, num_train=2)
    words = ["--data", str(tmp_path), "--epochs-run", "15"]
    said = "--epochs-run 15: the recipe has 14 epochs"
    assert refusal(fast_cifar.main, words, capsys) == said


# ---------------------------------------------------------------------------- queue and metrics


def figures_of(file: Path) -> dict[str, dict[str, float]]:
    """What a run of the benchmark wrote: value by name, part by part."""
    parts = json.loads(file.read_text())["parts"]
    return {part: {f["name"]: f["value"] for f in figures} for part, figures in parts.items()}


@contextmanager
def api_in_a_thread(place: cluster.Cluster) -> Iterator[int]:
    """The same application without the seconds that a process of its own needs to start."""
    port = cluster.free_port()
    server = Server(create_app(place.settings), "127.0.0.1", port)
    thread = threading.Thread(target=server.run)
    thread.start()
    cluster.wait_for(lambda: server.started, "the API")
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


def test_real_workers_claim_posted_jobs_and_drain_a_queue_once(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["--parts", "claim", "drain", "--posts", "2", "--jobs", "12", "--workers", "2"]
    assert queue.main([*words, "--json", str(file)]) == 0  # No goal is set on SQLite.
    figures = figures_of(file)
    assert 0 <= figures["claim"]["from POST to claimed, median"] < 60
    assert figures["drain"]["12 jobs, 2 workers, claim to finish"] > 0


def test_points_are_followed_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.Cluster, "api", api_in_a_thread)
    monkeypatch.setattr(queue.shutil, "which", lambda name: None)  # Neither Redis nor MLflow.
    file = tmp_path / "figures.json"
    words = ["--parts", "accept", "streams", "read", "metrics", "--accepted", "4", "--jobs", "3"]
    words += ["--clients", "2", "--streams", "6", "--writers", "2", "--write-seconds", "0.05"]
    words += ["--stream-seconds", "0.5", "--points", "9000", "--reads", "2", "--history", "800"]
    goals = ["--most-read-ms", "60000", "--most-lag-seconds", "60"]
    assert queue.main([*words, *goals, "--json", str(file)]) == 0
    figures = figures_of(file)
    assert figures["accept"]["jobs accepted, 2 clients, 3 queued before"] > 0
    assert 0 < figures["streams"]["age of a point in 6 streams without, median"] < 60
    assert set(figures["metrics"]) == {
        "800 points written, Skipline",
        "800 points read, Skipline",
    }
    said = capsys.readouterr().out
    assert "MLflow is left out: python -m venv" in said
    assert "No redis-server is installed" in said

    missed = ["--parts", "read", "--points", "40", "--reads", "1", "--most-read-ms", "0.001"]
    assert queue.main(missed) == 1
    assert "at most 0.001: MISSED" in capsys.readouterr().out


def test_a_figure_meets_its_goal_or_does_not() -> None:
    assert figures.Figure("x", 200.0, "jobs/s", at_least=200).is_met
    assert not figures.Figure("x", 199.9, "jobs/s", at_least=200).is_met
    assert not figures.Figure("x", 1.1, "s", at_most=1).is_met
    assert figures.Figure("x", 5.0, "s").is_met
    median, highest = figures.quantiles("x", [float(n) for n in range(1, 101)], "s", at_most=50)
    assert (median.value, median.is_met) == (50.5, False)
    assert (highest.value, highest.is_met) == (96.0, True)


def test_a_job_that_ran_twice_is_noticed(database: Database) -> None:
    before = queue.hold_a_job(database)
    queue.fill_queue(database, 3, waits_for=None)
    capacity = Capacity(("any", "auto", "cpu"))
    with database.session_scope() as session:
        lifecycle.finish(session, before, JobStatus.succeeded, result={})
        for _ in range(3):
            claim = lifecycle.claim(session, "w", "host", 60, capacity)
            assert claim is not None
            lifecycle.finish(session, claim.fence, JobStatus.succeeded, result={})
    assert queue.is_idle(database)
    began, ended = queue.check_each_ran_once(database, before, 3)
    assert began <= ended
    with database.session_scope() as session:
        repository.get_job(session, claim.fence.job_id).attempt = 2
    with pytest.raises(SystemExit, match="1 wrong"):
        queue.check_each_ran_once(database, before, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mlflow", "nowhere/mlflow"], "--mlflow nowhere/mlflow: there is no such command"),
        (["--jobs", "0"], "argument --jobs: invalid positive value: '0'"),
        (["--parts", "all"], "argument --parts: invalid choice"),
    ],
)
def test_wrong_usage_of_queue_is_told(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(queue.main, words, capsys).startswith(said)


@pytest.mark.parametrize("name", ["queue", "training"])
def test_a_benchmark_run_as_a_file_finds_the_standard_library(name: str) -> None:
    file = Path(queue.__file__).with_name(f"{name}.py")
    done = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


# ---------------------------------------------------------------------------------------- ingest


def test_an_archive_is_sent_brought_in_packed_and_compared(tmp_path: Path) -> None:
    archive = tmp_path / "pets.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(archive, "w") as opened:
        for number in range(40):
            file = BytesIO()
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            info = tarfile.TarInfo(f"pets/train/{'cat' if number % 2 else 'dog'}/{number}.png")
            info.size = file.tell()
            file.seek(0)
            opened.addfile(info, file)
    results = tmp_path / "figures.json"
    words = ["--archive", str(archive), "--rounds", "1", "--json", str(results)]
    assert ingest.main(words) in (0, 1)  # So few images say nothing of speed.
    [(name, measured)] = json.loads(results.read_text())["parts"].items()
    assert name == "pets.tar"
    rates = {figure["name"]: figure["value"] for figure in measured}
    assert rates["packing, against ImageFolder"] > 0
    assert 0 < rates["from the upload to packed"] < rates["packing"]


def test_image_folder_reads_what_holds_class_folders(tmp_path: Path) -> None:
    for path in ("a/train/cat", "a/train/dog", "a/val/images", "b/cat", "b/dog"):
        (tmp_path / path).mkdir(parents=True)
    assert ingest.image_folders(tmp_path / "a") == [tmp_path / "a" / "train"]
    assert ingest.image_folders(tmp_path / "b") == [tmp_path / "b"]


# ----------------------------------------------------------------------------- many clients at once


def test_clients_are_measured_against_the_bare_network_and_the_ratios_are_of_the_medians(
    tmp_path: Path,
) -> None:
    file = tmp_path / "figures.json"
    words = ["--image-size", "8", "--batch-size", "2", "--clients", "2", "--rounds", "1"]
    code = batching.main([*words, "--seconds", "0.05", "--json", str(file)])

    figures = {
        figure["name"]: figure for figure in json.loads(file.read_text())["parts"]["batching"]
    }
    speeds = {name: figures[name]["value"] for name in batching.CONTENDERS}
    assert min(speeds.values()) > 0
    for name in ("bare", "bare, folded", "one at a time"):
        ratio = figures[f"clients / {name}"]["value"]
        assert ratio == pytest.approx(speeds["clients"] / speeds[name])
    assert code == (0 if figures["clients / bare"]["value"] >= 0.8 else 1)
    assert (
        0 < figures["a client waits, median"]["value"] <= figures["a client waits, 99 %"]["value"]
    )


# ------------------------------------------------------------------------ predictions over HTTP


def test_whole_predictions_are_measured_against_a_hand_written_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["--only", "Skipline", "hand-written", "--rounds", "1", "--seconds", "0.5"]
    words += ["--clients", "1", "3", "--models", "4", "--requests", "24", "--json", str(file)]
    code = serving.main(words)

    parts = json.loads(file.read_text())["parts"]
    figures = {figure["name"]: figure for part in parts.values() for figure in part}
    for clients in ("1 client", "3 clients"):
        ours, theirs = (figures[f"{name}, {clients}"] for name in ("Skipline", "hand-written"))
        assert min(ours["value"], theirs["value"]) > 0
        ratio = figures[f"Skipline / hand-written, {clients}"]["value"]
        assert ratio == pytest.approx(ours["value"] / theirs["value"])
        assert (
            figures[f"Skipline, {clients}, p50"]["value"]
            <= (figures[f"Skipline, {clients}, p99"]["value"])
        )
    assert figures["answered 429"]["value"] > 0
    assert figures["good images refused, of 75"]["value"] == 0
    assert figures["damaged images refused, of 75"]["value"] == 75
    assert figures["bytes of models in memory / allowed"]["is_met"]
    assert code == (0 if all(figure["is_met"] for figure in figures.values()) else 1)
    assert "hand-written, 3 clients" in capsys.readouterr().out


def test_a_server_that_names_other_classes_is_not_measured() -> None:
    assert serving.agreement([[1, 2], [3, 4]], [[1, 0], [4, 3]]) == 0.5


def test_a_server_that_cannot_be_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(contender: serving.Contender, root: Path) -> Path:
        raise subprocess.CalledProcessError(1, "pip", stderr=b"no such package")

    monkeypatch.setattr(serving, "environment", fail)
    monkeypatch.setattr(serving, "measure_servers", lambda *rest: {})
    monkeypatch.setattr(serving, "server_figures", lambda measured: [])
    assert serving.main(["--only", "LitServe", "--models", "1"]) == 0
    assert "LitServe cannot be installed here and is left out: no such package" in (
        capsys.readouterr().out
    )


def test_the_best_of_the_others_is_what_counts() -> None:
    def measured(rate: float, seconds: float) -> serving.Measured:
        return serving.Measured({1: [rate]}, {1: [seconds] * 100})

    figures = {
        figure.name: figure.value
        for figure in serving.server_figures(
            {
                "Skipline": measured(30, 0.01),
                "hand-written": measured(10, 0.05),
                "LitServe": measured(20, 0.02),
            }
        )
    }
    assert figures["Skipline / best other, 1 client"] == 1.5
    assert figures["Skipline / best other, 1 client, p99"] == pytest.approx(0.5)
    assert figures["Skipline / hand-written, 1 client"] == 3


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--seconds", "0"], ["--only", "nobody"]])
def test_wrong_usage_of_serving_is_told(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serving.main(words)
    assert caught.value.code == 2
