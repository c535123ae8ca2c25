"""An example for every body of the OpenAPI document. Tests hold each against its schema."""

from __future__ import annotations

from typing import Any

from skipline import recipes
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.specs import IngestSpec, TrainSpec, dump_spec

Document = dict[str, Any]

_TIME = "2026-11-20T09:30:00.000Z"
_UPLOAD_ID = "019aa0ef-3b1d-7a61-9e02-5d4c8f7a2b90"
_JOB_ID = "019aa0f2-5c1e-7c43-9d0e-6a5b1f3f9a10"
_RETRY_ID = "019aa0f9-7d30-7b12-9c55-8e2f4d6b1a02"
_INGEST_ID = "019aa0f0-11aa-7d20-8a44-0f6f2f7d3c55"
_CHECKPOINT_ID = "019aa0f4-90b2-7e11-b1a7-3c9d8e21f604"
_DATASET_ID = "3f2a9c81d4e7b650"

JOB_REQUESTS: Document = {
    "smallest training": {"dataset": "digits"},
    "training": {
        "kind": "train",
        "name": "digits with SGD",
        "dataset": "digits",
        "model": {"arch": "resnet18"},
        "epochs": 5,
        "batch_size": 128,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "scheduler": {"name": "cosine", "warmup_epochs": 1},
    },
    "recipe": {"recipe": "cifar10_resnet18", "epochs": 30},
    "evaluation": {"kind": "evaluate", "model": _JOB_ID, "dataset": "digits", "split": "test"},
    "batch prediction": {"kind": "predict", "model": "production", "dataset": "digits"},
}
INGEST_REQUESTS: Document = {
    "folder": {"source": "path", "path": "flowers", "name": "flowers", "val_fraction": 0.1},
    "upload": {"source": "upload", "upload_id": _UPLOAD_ID, "name": "flowers", "seed": 1},
    "builtin": {"source": "builtin", "name": "cifar10"},
}
INGEST_FORM: Document = {
    "archive": "(the bytes of a zip or tar archive)",
    "name": "flowers",
    "val_fraction": 0.1,
}

_TRAINING = TrainSpec.model_validate({"dataset": "digits", "epochs": 5, "batch_size": 128})

TRAIN_JOB: Document = {
    "id": _JOB_ID,
    "kind": "train",
    "name": None,
    "status": "running",
    "spec": dump_spec(resolve(_TRAINING, BUILTIN_DATASETS["digits"])),
    "dataset_id": _DATASET_ID,
    "attempt": 1,
    "progress": {
        "step": 24,
        "num_steps": 55,
        "epoch": 3,
        "num_epochs": 5,
        "eta_seconds": 14.5,
        "images_per_second": 181.2,
    },
    "queue_position": None,
    "estimated_start_at": None,
    "created_at": _TIME,
    "started_at": _TIME,
    "finished_at": None,
    "result": None,
    "error": None,
    "stop_reason": None,
    "parent_id": None,
}
PAUSING_JOB = TRAIN_JOB | {"status": "pausing"}
RESUMED_JOB = TRAIN_JOB | {"status": "queued", "queue_position": 1, "estimated_start_at": _TIME}
STOPPING_JOB = TRAIN_JOB | {"status": "stopping"}
CANCELLED_JOB = TRAIN_JOB | {"status": "cancelled", "finished_at": _TIME}
RETRY_JOB = TRAIN_JOB | {
    "id": _RETRY_ID,
    "status": "queued",
    "spec": {**TRAIN_JOB["spec"], "parent_id": _JOB_ID},
    "attempt": 0,
    "progress": None,
    "queue_position": 1,
    "started_at": None,
    "parent_id": _JOB_ID,
}
JOBS: Document = {"items": [TRAIN_JOB], "next": None}
INGEST_JOB = TRAIN_JOB | {
    "id": _INGEST_ID,
    "kind": "ingest",
    "name": "flowers",
    "status": "queued",
    "spec": dump_spec(IngestSpec.model_validate(INGEST_REQUESTS["folder"])),
    "dataset_id": None,
    "attempt": 0,
    "progress": None,
    "queue_position": 1,
    "started_at": None,
}

METRICS: Document = {
    "job_id": _JOB_ID,
    "status": "running",
    "series": {
        "train_loss": [
            {"step": 11, "epoch": 1, "value": 1.92, "time": _TIME},
            {"step": 22, "epoch": 2, "value": 0.71, "time": _TIME},
        ],
        "val_top1": [{"step": 11, "epoch": 1, "value": 0.58, "time": _TIME}],
    },
    "next": "3",
}
METRIC_STREAM = (
    'event: metric\ndata: {"step":11,"epoch":1,"value":1.92,"time":"2026-11-20T09:30:00.000Z",'
    '"name":"train_loss","attempt":1}\nid: 1\n\n'
    'event: rewind\ndata: {"step":11,"attempt":2}\nid: 4\n\n'
    'event: end\ndata: {"status":"succeeded"}\n\n'
)
EVENTS: Document = {
    "items": [
        {
            "id": 1,
            "time": _TIME,
            "level": "info",
            "type": "created",
            "message": "Stored as a job of kind train",
            "data": {},
        },
        {
            "id": 2,
            "time": _TIME,
            "level": "warning",
            "type": "lost",
            "message": "The trainer was killed by signal 9",
            "data": {},
        },
    ],
    "next": None,
}
EVENT_STREAM = (
    'event: event\ndata: {"id":1,"time":"2026-11-20T09:30:00.000Z","level":"info",'
    '"type":"created","message":"Stored as a job of kind train","data":{}}\nid: 1\n\n'
    'event: end\ndata: {"status":"succeeded"}\n\n'
)
ATTEMPTS: Document = {
    "items": [
        {
            "number": 1,
            "host": "gpu-1",
            "gpus": [0],
            "started_at": _TIME,
            "ended_at": _TIME,
            "outcome": "lost",
            "reason": "The trainer was killed by signal 9",
        },
        {
            "number": 2,
            "host": "gpu-2",
            "gpus": [3],
            "started_at": _TIME,
            "ended_at": None,
            "outcome": None,
            "reason": None,
        },
    ],
    "next": None,
}
LOG = "Epoch 1: the loss is 1.92\n"
SUMMARY: Document = {
    "layers": [
        {"name": "conv1", "type": "Conv2d", "output_shape": [64, 32, 32], "num_parameters": 1728},
        {"name": "fc", "type": "Linear", "output_shape": [10], "num_parameters": 5130},
    ],
    "num_parameters": 11173962,
    "num_trainable_parameters": 11173962,
    "multiply_adds": 555422720,
    "forward_bytes": 9830440,
}
CHECKPOINTS: Document = {
    "items": [
        {
            "id": _CHECKPOINT_ID,
            "kind": "best",
            "epoch": 2,
            "step": 22,
            "metrics": {"val_loss": 0.64, "val_top1": 0.82},
            "num_bytes": 134217728,
            "created_at": _TIME,
        }
    ],
    "next": None,
}
MODEL: Document = {
    "alias": "production",
    "checkpoint_id": _CHECKPOINT_ID,
    "former_checkpoint_id": None,
    "job_id": _JOB_ID,
    "arch": "resnet18",
    "dataset": "cats-and-dogs",
    "dataset_id": _DATASET_ID,
    "epoch": 2,
    "step": 22,
    "metrics": {"val_loss": 0.64, "val_top1": 0.82},
    "num_bytes": 134217728,
    "notes": "Takes photos from outdoors too",
    "tags": ["outdoors"],
    "number": 1,
    "moved_at": _TIME,
}
MODELS: Document = {"items": [MODEL], "next": None}
LOADED_MODELS: Document = {
    "items": [
        {
            "checkpoint_id": _CHECKPOINT_ID,
            "arch": "resnet18",
            "backend": "onnxruntime",
            "num_bytes": 44696632,
            "loaded_at": _TIME,
            "used_at": _TIME,
        }
    ],
    "num_bytes": 44696632,
    "max_bytes": 2147483648,
}
ALIAS_CHANGES: Document = {
    "move it": {"checkpoint_id": _CHECKPOINT_ID},
    "say what of it": {"notes": "Takes photos from outdoors too", "tags": ["outdoors"]},
}
ALIAS_MOVES: Document = {
    "items": [
        {
            "number": 1,
            "checkpoint_id": _CHECKPOINT_ID,
            "job_id": _JOB_ID,
            "submitter": "",
            "created_at": _TIME,
        }
    ],
    "next": None,
}
_JUDGED: Document = {
    "image": "test/cat/7.jpg",
    "split": "test",
    "index": 3,
    "label": "cat",
    "predicted": "dog",
    "confidence": 0.91,
    "loss": 2.4,
}
REPORT: Document = {
    "dataset": "cats-and-dogs",
    "dataset_id": _DATASET_ID,
    "split": "test",
    "selected_on": "val",
    "checkpoint_id": _CHECKPOINT_ID,
    "num_samples": 10,
    "loss": 0.41,
    "top1": 0.8,
    "top1_interval": [0.4902, 0.9433],
    "top5": 1.0,
    "mean_class_accuracy": 0.8,
    "per_class": [
        {
            "label": "cat",
            "num_samples": 5,
            "accuracy": 0.8,
            "accuracy_interval": [0.3755, 0.9638],
            "precision": 0.8,
            "recall": 0.8,
            "f1": 0.8,
        },
        {
            "label": "dog",
            "num_samples": 5,
            "accuracy": 0.8,
            "accuracy_interval": [0.3755, 0.9638],
            "precision": 0.8,
            "recall": 0.8,
            "f1": 0.8,
        },
    ],
    "confusion": [[4, 1], [1, 4]],
    "calibration": {
        "ece": 0.1,
        "temperature": 1.24,
        "calibrated_ece": 0.06,
        "reject_below": 0.41,
        "bins": [
            {
                "lower": 0.8667,
                "upper": 0.9333,
                "num_images": 10,
                "confidence": 0.9,
                "accuracy": 0.8,
            }
        ],
    },
    "hardest": [_JUDGED],
    "confused": [
        {"label": "cat", "predicted": "dog", "num_images": 1, "share": 0.2, "images": [_JUDGED]}
    ],
}
REPORT_CSV = (
    "label,num_samples,accuracy,precision,recall,f1,accuracy_low,accuracy_high\r\n"
    "cat,5,0.8,0.8,0.8,0.8,0.3755,0.9638\r\n"
)

UPLOAD: Document = {
    "id": _UPLOAD_ID,
    "file_name": "photos.zip",
    "num_bytes": 47736619,
    "offset": 16777216,
    "created_at": _TIME,
    "expires_at": "2026-11-25T09:30:00.000Z",
    "job_id": None,
}
UPLOADS: Document = {"items": [UPLOAD], "next": None}

DATASET_IMAGES: Document = {
    "items": [
        {
            "split": "train",
            "index": 0,
            "label": "cat",
            "path": "train/cat/0001.jpg",
            "num_bytes": 18230,
            "image_url": f"/datasets/{_DATASET_ID}/images/train/0",
            "thumbnail_url": f"/datasets/{_DATASET_ID}/images/train/0/thumbnail.png",
        }
    ],
    "next": "0",
}
DATASET: Document = {
    "id": _DATASET_ID,
    "name": "cats-and-dogs",
    "hash": "3f2a9c81d4e7b650" * 4,
    "num_classes": 2,
    "classes": ["cat", "dog"],
    "splits": {
        "train": {"num_images": 200, "per_class": [100, 100]},
        "test": {"num_images": 10, "per_class": [5, 5]},
    },
    "image_size": 224,
    "channel_mean": [0.485, 0.456, 0.406],
    "channel_std": [0.229, 0.224, 0.225],
    "channel_image_std": [0.221, 0.217, 0.218],
    "image_sizes": {
        "width": {"min": 240, "p25": 300, "median": 375, "p75": 500, "max": 640},
        "height": {"min": 224, "p25": 280, "median": 333, "p75": 375, "max": 480},
        "file_bytes": {"min": 9120, "p25": 14000, "median": 18230, "p75": 25110, "max": 90456},
        "num_distinct": 61,
        "most_common": [{"width": 500, "height": 375, "num_images": 84}],
    },
    "problems": [
        {
            "code": "unreadable_image",
            "level": "warning",
            "message": "Images that do not decode were left out",
            "count": 1,
            "examples": ["train/cat/0001.jpg"],
        }
    ],
    "num_bytes": 4123456,
    "labels": ["cats-and-dogs:1"],
    "created_at": _TIME,
    "dropped_at": None,
}
DATASETS: Document = {
    "items": [DATASET],
    "next": None,
    "builtin": [
        {
            "name": "digits",
            "num_classes": 10,
            "image_size": 32,
            "splits": {"train": 1442, "test": 355},
            "description": "UCI handwritten digits, 8x8 grey, shipped with scikit-learn",
            "needs_network": False,
        }
    ],
}
ARCHITECTURES: Document = {
    "items": [
        {
            "name": "resnet18",
            "family": "resnet",
            "depth": 18,
            "batch_norm": True,
            "min_image_size": {"small": 8, "imagenet": 32},
            "description": "ResNet-18 with basic blocks (He et al., 2016)",
        }
    ],
    "next": None,
}

_RECIPE = recipes.RECIPES["cifar10_resnet18"]
RECIPES: Document = {
    "items": [
        {
            "name": _RECIPE.name,
            "description": _RECIPE.description,
            "source": _RECIPE.source,
            "dataset": _RECIPE.spec["dataset"],
            "spec": _RECIPE.spec,
        }
    ],
    "next": None,
}

PREDICT_FORM: Document = {"image": ["(the bytes of an image file)"], "model": _JOB_ID, "top_k": 2}
PREDICT_DOCUMENT: Document = {"images": ["(an image file in Base64)"], "model": "production"}
_PREDICTING: Document = {
    "checkpoint_id": _CHECKPOINT_ID,
    "job_id": _JOB_ID,
    "arch": "resnet18",
    "epoch": 2,
    "step": 22,
    "temperature": 1.24,
    "reject_below": 0.41,
}
_TOP = [
    {"label": "7", "index": 7, "probability": 0.97},
    {"label": "1", "index": 1, "probability": 0.02},
]
BATCH_PREDICTIONS: Document = {
    "model": _PREDICTING,
    "predictions": [
        {
            "image": "test/7/0003.png",
            "split": "test",
            "index": 258,
            "label": "7",
            "top": _TOP,
            "confidence": 0.97,
            "unknown": False,
            "error": None,
        }
    ],
}
BATCH_CSV = (
    "image,split,index,label,unknown,error,class_1,probability_1,class_2,probability_2\r\n"
    "test/7/0003.png,test,258,7,false,,7,0.97,1,0.02\r\n"
)
PREDICTIONS: Document = {
    "model": _PREDICTING,
    "predictions": [
        {
            "image": "seven.png",
            "top": _TOP,
            "confidence": 0.97,
            "unknown": False,
            "explanation": None,
            "features": None,
        }
    ],
    "timing_ms": {"decode": 1.4, "queue": 0.1, "load": 0.0, "forward": 9.8},
}

WORKERS: Document = {
    "items": [
        {
            "id": "019aa0e0-3b6f-7a01-8d41-5f0c2e9b7d18",
            "host": "gpu-1",
            "status": "active",
            "num_slots": 2,
            "num_cores": 16,
            "devices": [
                {
                    "type": "cpu",
                    "index": 0,
                    "name": "16 cores",
                    "memory_bytes": 137438953472,
                    "job_id": None,
                },
                {
                    "type": "cuda",
                    "index": 0,
                    "name": "NVIDIA H100",
                    "memory_bytes": 85520809984,
                    "job_id": _JOB_ID,
                },
            ],
            "job_ids": [_JOB_ID],
            "started_at": _TIME,
            "seen_at": _TIME,
        }
    ],
    "next": None,
}

READY: Document = {
    "status": "ready",
    "checks": {"database": "ok", "broker": "ok", "storage": "ok"},
}
NOT_READY: Document = {
    "status": "not_ready",
    "checks": {"database": "ok", "broker": "no answer within 3 s", "storage": "ok"},
}

COMPARISON: Document = {
    "a": {"checkpoint_id": _CHECKPOINT_ID, "job_id": _JOB_ID, "arch": "resnet18", "epoch": 5},
    "b": {"checkpoint_id": _CHECKPOINT_ID, "job_id": _JOB_ID, "arch": "resnet18", "epoch": 9},
    "dataset": "digits",
    "dataset_id": _DATASET_ID,
    "split": "test",
    "num_samples": 355,
    "top1_a": 0.9718,
    "top1_b": 0.9831,
    "difference": 0.0113,
    "difference_interval": [-0.001, 0.0236],
    "p_value": 0.2188,
    "num_lost": 1,
    "num_gained": 5,
    "agreement": 0.9803,
    "per_class": [
        {
            "label": "8",
            "num_samples": 34,
            "accuracy_a": 0.9118,
            "accuracy_b": 0.9706,
            "difference": 0.0588,
        }
    ],
    "lost": [{"split": "test", "index": 12, "label": "0", "called_a": "0", "called_b": "6"}],
    "gained": [{"split": "test", "index": 290, "label": "8", "called_a": "1", "called_b": "8"}],
}

CARD = """# production

An image classifier: resnet18, trained on digits, as of epoch 5.
"""

EXPOSITION = """# HELP skipline_jobs Stored jobs
# TYPE skipline_jobs gauge
skipline_jobs{kind="train",status="queued"} 2.0
"""


def _problem(status: int, code: str, title: str, detail: str, *errors: Document) -> Document:
    return {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": list(errors),
    }


PROBLEMS: dict[int, Document] = {
    problem["status"]: problem
    for problem in (
        _problem(
            400,
            "malformed_json",
            "The request cannot be read",
            "The body is not a JSON document that can be read",
        ),
        _problem(
            401,
            "unauthorized",
            "A valid key is needed",
            "Send the header Authorization: Bearer with this server's key",
        ),
        _problem(404, "job_not_found", "There is no such job", "There is no job of this id"),
        _problem(
            409,
            "illegal_transition",
            "The job's state does not allow this",
            "The job has succeeded; only an unfinished one is cancelled",
        ),
        _problem(
            412,
            "unsupported_tus_version",
            "This version of tus is not spoken here",
            "Send Tus-Resumable: 1.0.0",
        ),
        _problem(
            413, "body_too_large", "The request is too large", "At most 1,048,576 bytes are taken"
        ),
        _problem(
            415,
            "unsupported_media_type",
            "The request has the wrong content type",
            "Send JSON, with Content-Type: application/json",
        ),
        _problem(
            422,
            "invalid_spec",
            "The request holds invalid values",
            "optimizer.lr: Input should be greater than 0",
            {"loc": "optimizer.lr", "message": "Input should be greater than 0"},
        ),
        _problem(
            423,
            "upload_busy",
            "The upload is being written to",
            "Another request writes to the upload: wait for its end",
        ),
        _problem(
            429,
            "too_busy",
            "Too much is waiting",
            "64 predictions wait already; try again in a moment",
        ),
        _problem(
            500,
            "internal_error",
            "Something went wrong",
            "The server's log says more, under the request id 4f6c0b9e",
        ),
        _problem(
            503,
            "database_unavailable",
            "The service is not ready",
            "The database does not answer",
        ),
        _problem(
            504,
            "prediction_timeout",
            "The prediction took too long",
            "There was no answer within 30 s: try again when less is asked for",
        ),
        _problem(
            507,
            "disk_full",
            "The server's disk is full",
            "There is no room for the file: free some disk on the server, then go on",
        ),
    )
}
