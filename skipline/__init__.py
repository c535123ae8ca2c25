"""Skipline: train, evaluate and serve image classifiers.

from skipline import Skipline

with Skipline() as client:
    job = client.train(dataset="digits", model={"arch": "resnet18"}, epochs=5)
    print(client.wait(job.id).status)
"""

from skipline.client import ServerUnreachable, Skipline, SkiplineError

__all__ = ["ServerUnreachable", "Skipline", "SkiplineError"]
