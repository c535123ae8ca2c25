"""Which paths on the server's disk datasets may be read from.

Asked when a job is submitted and again before it reads. Knows nothing of images or archives, and
never repeats a path of the server's in what it says.
"""

from __future__ import annotations

import stat
from pathlib import Path

from shared.errors import InvalidInput, PathNotAllowed
from shared.settings import Settings


def check_dataset_path(path: str, settings: Settings) -> Path:
    """The folder or file that `path` names, all links resolved.

    A relative path is relative to the first of `settings.resolved_dataset_roots`. Whether a path
    exists is only told below the roots.

    Raises:
        PathNotAllowed: it does not lie below a root once its links are resolved.
        InvalidInput: there is no such folder or file, or it cannot be read.
    """
    roots = settings.resolved_dataset_roots
    try:
        resolved = (roots[0] / path).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL; a name too long
        raise _refuse(InvalidInput, "This is not a path that can be read") from None
    if not any(resolved.is_relative_to(root) for root in roots):
        raise _refuse(
            PathNotAllowed, "Datasets are only read below the folders in SKIPLINE_DATASET_ROOTS"
        )
    try:
        mode = resolved.stat().st_mode
    except OSError:
        raise _refuse(
            InvalidInput, "There is no such folder or file, or it cannot be read"
        ) from None
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise _refuse(InvalidInput, "This is neither a folder nor an archive file")
    return resolved


def _refuse(kind: type[InvalidInput], message: str) -> InvalidInput:
    return kind(message, errors=[{"loc": "path", "message": message}])
