"""The files of a checkpoint that are its model, beside whatever its training resumes from. Their
contents are `shared.vision.bundle`'s; the names are here for those that load no torch."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"
BUNDLE_FILE = "bundle.json"
MODEL_FILES = (WEIGHTS_FILE, BUNDLE_FILE)
