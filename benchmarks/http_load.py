"""Clients that ask one after the other, over HTTP/1.1 connections that stay open. As little work as
can be, since they share the machine with what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """A request: its path, and the body with its type; without a body it is a GET."""

    path: str
    body: bytes = b""
    content_type: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def encode(self) -> bytes:
        lines = [f"{'POST' if self.body else 'GET'} {self.path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body:
            lines += [f"Content-Type: {self.content_type}", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass
class Load:
    """What became of the requests: seconds of each that was answered with 200, how many were
    answered otherwise by status, and how long it all took."""

    seconds: float
    times: list[float] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Answers with 200 per second."""
        return len(self.times) / self.seconds


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: bytes) -> int:
    """The status of the answer, whose body is read and dropped."""
    return (await answer(reader, writer, call))[0]


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: bytes
) -> tuple[int, bytes]:
    """Status and body."""
    writer.write(call)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    at = head.find(b"content-length:")
    if at >= 0:
        length = int(head[at + 15 : head.index(b"\r", at)])
        return status, await reader.readexactly(length)
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return status, body


def once(port: int, call: Call) -> tuple[int, bytes]:
    """Status and body of one answer."""

    async def run() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await answer(reader, writer, call.encode())
        finally:
            writer.close()

    return asyncio.run(run())


def load(port: int, calls: Sequence[Call], num_clients: int, seconds: float) -> Load:
    """`num_clients` send the calls, each beginning at another one."""
    return asyncio.run(_load(port, [call.encode() for call in calls], num_clients, seconds))


async def _load(port: int, calls: Sequence[bytes], num_clients: int, seconds: float) -> Load:
    result = Load(seconds)
    end = time.perf_counter() + seconds

    async def client(place: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = place * len(calls) // num_clients
        while (began := time.perf_counter()) < end:
            status = await ask(reader, writer, calls[number % len(calls)])
            done = time.perf_counter()
            if status != 200:
                result.refused[status] = result.refused.get(status, 0) + 1
            elif done < end:
                result.times.append(done - began)
            number += 1
        writer.close()

    await asyncio.gather(*(client(place) for place in range(num_clients)))
    return result


def probe(port: int, call: Call, seconds: float, pause: float) -> list[float]:
    """Seconds of each answer to a call that comes again every `pause` seconds."""

    async def run() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        times, encoded = [], call.encode()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            status = await ask(reader, writer, encoded)
            assert status == 200, status
            times.append(time.perf_counter() - began)
            await asyncio.sleep(pause)
        writer.close()
        return times

    return asyncio.run(run())
