"""What a client may name things by. Knows nothing of what there is."""

from __future__ import annotations

from shared.errors import ModelNotFound

MAX_ID_LENGTH = 64


def is_id(value: str) -> bool:
    """Whether `value` could be an id. What could not never reaches the database, whose texts
    hold less than a URL or a form can."""
    return len(value) <= MAX_ID_LENGTH and value.isprintable() and value.isascii()


def check_model_reference(reference: str) -> None:
    """Raises `ModelNotFound` for what can be no model's."""
    if not is_id(reference):
        raise ModelNotFound("There is no checkpoint, no job and no alias of this name")
