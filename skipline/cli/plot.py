"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

from skipline.cli.output import writing
from skipline.client import SkiplineError
from skipline.plots import NothingToDraw, draw_curves
from skipline.schemas import Metrics


def plot_metrics(metrics: Metrics, path: Path, title: str) -> None:
    """Draws loss, accuracy and lr over the steps to `path`, in the format that its name ends in.

    Raises:
        SkiplineError: matplotlib is missing, there is nothing to draw, or the file cannot be
            written.
    """
    try:
        picture = draw_curves(metrics, title, format=path.suffix.removeprefix(".") or "png")
    except ImportError:
        raise SkiplineError(
            "Drawing needs matplotlib: pip install 'skipline[plot]'", code="missing_matplotlib"
        ) from None
    except NothingToDraw as error:
        raise SkiplineError(str(error), code="no_metrics") from None
    except ValueError as error:  # matplotlib's, for a format that it does not know
        raise SkiplineError(f"{path} cannot be written: {error}", code="not_written") from None
    write_picture(path, picture)


def write_picture(path: Path, picture: bytes) -> None:
    """Raises `SkiplineError` for a file that cannot be written."""
    with writing(path):
        path.write_bytes(picture)
