"""Multipart forms with one large file, which goes to the disk as it comes.

Starlette's own parser would keep the file in a temporary one first, and hold it twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from shared.errors import InvalidInput, MalformedBody

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 64 * 2**10
MAX_PARTS = 16
MAX_HEADERS = 16
"""Of one part."""


class LargeFileForm:
    """Reads a form whose file part `file_field` is handed on in pieces, and whose other parts are
    short texts.

    Args:
        write: takes the pieces of the file, in a thread.

    After `read`: `fields`, the texts by name; `file_name`, None if there was no file.
    """

    def __init__(self, file_field: str, write: Callable[[bytes], None]) -> None:
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self._file_field = file_field
        self._write = write
        self._num_parts = 0
        self._header = [bytearray(), bytearray()]
        self._disposition = b""
        self._field: str | None = None
        self._text = bytearray()
        self._is_whole = False

    async def read(self, request: Request, body: AsyncIterator[bytes]) -> None:
        """Reads `body` to its end.

        Raises:
            MalformedBody: it is no form, or ends early.
            InvalidInput: two files, a text that is too long, or the like.
        """
        _, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        try:
            parser = MultipartParser(boundary, self._callbacks(), max_header_count=MAX_HEADERS)
            async for data in body:
                await run_in_threadpool(parser.write, data)
            parser.finalize()
        except (FormParserError, ValueError, LookupError):
            raise MalformedBody("The body is not a form that can be read") from None
        if not self._is_whole:
            raise MalformedBody("The form ends before its closing boundary")

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": partial(self._add_to_header, 0),
            "on_header_value": partial(self._add_to_header, 1),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._add_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidInput(f"A form has at most {MAX_PARTS} parts here")
        self._disposition, self._field = b"", None
        self._text.clear()

    def _add_to_header(self, side: int, data: bytes, start: int, end: int) -> None:
        self._header[side] += data[start:end]

    def _end_header(self) -> None:
        name, value = map(bytes, self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        for part in self._header:
            part.clear()

    def _begin_content(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise MalformedBody("A part of the form does not say its name")
        name = options[b"name"].decode("utf-8", "replace")
        is_file = b"filename" in options
        if is_file != (name == self._file_field):
            what = "a file" if name == self._file_field else "a text"
            self._refuse(name, f"Send {what} here")
        if name in self.fields or (is_file and self.file_name is not None):
            self._refuse(name, "Send it once")
        if is_file:
            self.file_name = options[b"filename"].decode("utf-8", "replace")
        else:
            self._field = name

    @staticmethod
    def _refuse(name: str, message: str) -> None:
        raise InvalidInput(f"{name}: {message}", errors=[{"loc": name, "message": message}])

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            self._refuse(self._field, f"At most {MAX_FIELD_BYTES:,} bytes are taken here")

    def _end_part(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_whole = True
