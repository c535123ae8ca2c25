"""The two error trees: `AppError` becomes a problem document, `TrainingError` is stored on its job.

Messages say what is the case, hints what to do next. Neither ever holds a path of the server's.
"""

from __future__ import annotations


class AppError(Exception):
    """An error that a client caused or can act on. `code` is stable; `status` is HTTP's."""

    status = 500
    code = "internal_error"
    title = "Something went wrong"

    def __init__(self, detail: str, *, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors or []


class InvalidInput(AppError):
    """The request is understood and cannot be carried out; `errors` names the keys."""

    status = 422
    code = "invalid_input"
    title = "The request holds invalid values"


class UnknownDataset(InvalidInput):
    code = "unknown_dataset"
    title = "There is no such dataset"


class PathNotAllowed(InvalidInput):
    code = "path_not_allowed"
    title = "Datasets are not read from there"


class BadArchive(InvalidInput):
    """Bytes that are no archive that datasets are read from."""

    code = "bad_archive"
    title = "This is not an archive that can be read"


class BadModelFile(InvalidInput):
    """Bytes that are no model that was exported."""

    code = "bad_model_file"
    title = "This is not a model that Skipline exported as safetensors"


class BadImage(InvalidInput):
    """Bytes that are no image of an allowed format, or do not decode to their end."""

    code = "bad_image"
    title = "This is not an image that can be read"


class ImageTooLarge(AppError):
    status = 413
    code = "image_too_large"
    title = "The image has too many pixels"


class BodyTooLarge(AppError):
    status = 413
    code = "body_too_large"
    title = "The request is too large"


class MalformedBody(AppError):
    """The body is not in the format that its content type names."""

    status = 400
    code = "malformed_body"
    title = "The request cannot be read"


class MalformedJson(MalformedBody):
    code = "malformed_json"


class UnsupportedMediaType(AppError):
    status = 415
    code = "unsupported_media_type"
    title = "The request has the wrong content type"


class NotFound(AppError):
    status = 404
    code = "not_found"
    title = "There is no such thing"


class JobNotFound(NotFound):
    code = "job_not_found"
    title = "There is no such job"


class AttemptNotFound(NotFound):
    code = "attempt_not_found"
    title = "There was no such attempt at the job"


class DatasetNotFound(NotFound):
    code = "dataset_not_found"
    title = "There is no such dataset"


class ImageNotFound(NotFound):
    code = "image_not_found"
    title = "There is no such image in the dataset"


class UploadNotFound(NotFound):
    code = "upload_not_found"
    title = "There is no such upload"


class ModelNotFound(NotFound):
    code = "model_not_found"
    title = "There is no such model"


class AliasNotFound(NotFound):
    code = "alias_not_found"
    title = "There is no such alias"


class ReportNotReady(NotFound):
    code = "report_not_ready"
    title = "The job has no report yet"


class PredictionsNotReady(NotFound):
    code = "predictions_not_ready"
    title = "The job has made no predictions yet"


class SummaryNotReady(NotFound):
    code = "summary_not_ready"
    title = "The job has no summary yet"


class PictureNotReady(NotFound):
    code = "picture_not_ready"
    title = "There is no such picture of the job yet"


class Conflict(AppError):
    status = 409
    code = "conflict"
    title = "The state does not allow this"


class IllegalTransition(Conflict):
    code = "illegal_transition"
    title = "The job's state does not allow this"


class JobInUse(Conflict):
    """Something else needs the job, or what it made."""

    code = "in_use"
    title = "The job is in use"


class PromotionRefused(Conflict):
    """A model does not keep what was asked of it; `errors` says in which figures."""

    code = "promotion_refused"
    title = "The model is not good enough"


class ExportNotPossible(Conflict):
    code = "export_not_possible"
    title = "The model cannot be exported like this"


class NotEvaluated(Conflict):
    """There is no report on the images that a model is to be judged by."""

    code = "not_evaluated"
    title = "The model was not evaluated on these images"


class NothingToTakeBack(Conflict):
    """The alias never stood for another model, or that one is gone."""

    code = "nothing_to_take_back"
    title = "The alias has no former model"


class DatasetInUse(Conflict):
    """Models or jobs depend on the dataset; `errors` lists them."""

    code = "in_use"
    title = "The dataset is in use"


class DatasetGone(Conflict):
    """The record is all that is left of the dataset."""

    code = "dataset_gone"
    title = "The dataset's images were deleted"


class DatasetDamaged(Conflict):
    code = "dataset_damaged"
    title = "The dataset's stored files are damaged"


class UploadIncomplete(Conflict):
    code = "upload_incomplete"
    title = "The upload is not complete"


class UploadInUse(Conflict):
    """A job reads it."""

    code = "in_use"
    title = "The upload is in use"


class OffsetMismatch(Conflict):
    """The bytes sent do not begin where those that are there end."""

    code = "offset_mismatch"
    title = "The upload goes on elsewhere"


class IdempotencyMismatch(Conflict):
    code = "idempotency_mismatch"
    title = "The Idempotency-Key was used for another request"


class NoCheckpointYet(Conflict):
    code = "no_checkpoint_yet"
    title = "The job has no checkpoint yet"


class CheckpointCorrupt(Conflict):
    code = "checkpoint_corrupt"
    title = "The checkpoint is damaged"


class UnsupportedTusVersion(AppError):
    status = 412
    code = "unsupported_tus_version"
    title = "This version of tus is not spoken here"


class UploadBusy(AppError):
    """Another request is writing to it."""

    status = 423
    code = "upload_busy"
    title = "The upload is being written to"


class DiskFull(AppError):
    status = 507
    code = "disk_full"
    title = "The server's disk is full"


class Unauthorized(AppError):
    status = 401
    code = "unauthorized"
    title = "A valid key is needed"


class TooBusy(AppError):
    status = 429
    code = "too_busy"
    title = "Too much is waiting"


class PredictionTimeout(AppError):
    """The answer would have come too late."""

    status = 504
    code = "prediction_timeout"
    title = "The prediction took too long"


class ExportTimeout(AppError):
    """The file would have come too late."""

    status = 504
    code = "export_timeout"
    title = "The export took too long"


class TooManyStreams(TooBusy):
    code = "too_many_streams"


class TooManyJobs(TooBusy):
    code = "too_many_jobs"


class TooManyUploads(TooBusy):
    code = "too_many_uploads"


class SetupError(Exception):
    """The service cannot start or go on as it is set up: one line that says what to do."""


class TrainingError(Exception):
    """Why a job failed, as its `error` says it. Blind repetition would fail again."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
