from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import update

from shared import lifecycle, repository
from shared.database import db_now
from shared.tables import Worker
from skipline import schemas

GPU = {"type": "cuda", "index": 0, "name": "A GPU", "memory_bytes": 2**34}
CPU = {"type": "cpu", "index": 0, "name": "A processor", "memory_bytes": 2**33}


def see(database: Any, worker_id: str, **facts: Any) -> None:
    values = {"num_gpus": 0, "num_cores": 4, "num_slots": 1, "devices": [CPU]} | facts
    with database.session_scope() as session:
        seen = repository.WorkerFacts(f"host-of-{worker_id}", **values)
        repository.see_worker(session, worker_id, seen)


def test_workers_are_listed_with_what_they_have_and_what_runs_on_them(
    api: Any, database: Any, assert_problem: Callable[..., Any]
) -> None:
    assert api.get("/workers").json() == {"items": [], "next": None}
    see(database, "one", num_gpus=1, num_slots=2, devices=[CPU, GPU])
    see(database, "two", is_draining=True)
    see(database, "three")
    job_id = api.submit(resources={"device": "cuda"})["id"]
    with database.session_scope() as session:
        gone = update(Worker).where(Worker.id == "three").values(seen_at=db_now(-61))
        session.execute(gone)
        capacity = lifecycle.Capacity(("any", "cuda"), num_gpus=1, num_free_gpus=1)
        claim = lifecycle.claim(session, "an-owner", "host-of-one", 600, capacity, "one")
        assert claim is not None
        lifecycle.note_gpus(session, claim.fence, [0])
    page = api.get("/workers").json()
    schemas.Page[schemas.Worker].model_validate(page)
    workers = {worker["id"]: worker for worker in page["items"]}
    assert {name: worker["status"] for name, worker in workers.items()} == {
        "one": "active",
        "two": "draining",
        "three": "lost",
    }
    one = workers["one"]
    assert (one["host"], one["num_slots"], one["num_cores"]) == ("host-of-one", 2, 4)
    assert one["devices"] == [CPU | {"job_id": None}, GPU | {"job_id": job_id}]
    assert (one["job_ids"], workers["two"]["job_ids"]) == ([job_id], [])
    first = api.get("/workers", params={"limit": 2}).json()
    rest = api.get("/workers", params={"limit": 2, "after": first["next"]}).json()
    assert (first["items"] + rest["items"], rest["next"]) == (page["items"], None)
    assert_problem(api.get("/workers", params={"after": "nobody"}), 422, "invalid_input")
