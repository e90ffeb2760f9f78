"""The file an offline measurement leaves: JSON with the model it belongs to, the command that made it, and its data."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.fingerprint import model_directory, model_fingerprint

SCHEMA = 1
# Kind -> subcommand.
MAKERS = {
    "tsp-layer": "tsp-layer",
    "head-importance": "heads",
    "retrieval-heads": "duo",
    "layer-decays": "decays",
    "layer-sharing": "sharing",
    "layer-merging": "merging",
    "channel-groups": "channels",
}


@dataclass(frozen=True)
class Artefact:
    """What was measured on one model.

    Fields:
        kind: one of MAKERS; decides what `data` holds (docs/calibration.md).
        model: last part of the model's name, for readers; nothing depends on it.
        fingerprint: of the model, see `model_fingerprint`.
        created: UTC, ISO 8601, seconds.
        command: command line that made it.
        settings: everything the data depends on beside the model, JSON types.
        data: JSON types; floats are exact.
        schema: version of this layout.
    """

    kind: str
    model: str
    fingerprint: str
    created: str
    command: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    schema: int = SCHEMA


def make(
    kind: str, model: str | Path, *, command: str, settings: Mapping[str, Any], data: Mapping[str, Any]
) -> Artefact:
    """Artefact of `model`, made now."""
    assert kind in MAKERS, f"unknown kind {kind!r}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    name = model_directory(model).resolve().name
    return Artefact(kind, name, model_fingerprint(model), created, command, dict(settings), dict(data))


def save(artefact: Artefact, path: Path) -> None:
    """Write the file in one step: it is never half there. NaN and infinity are refused, JSON has none."""
    write_json(path, asdict(artefact))


def load(path: str | Path, kind: str, model: str | Path) -> Artefact:
    """Read an artefact of that kind, made for that model.

    Args:
        path: file written by `save`.
        kind: what the caller needs, one of MAKERS.
        model: directory, or name in the local Hugging Face cache, of the model it is to be used with.

    Raises:
        CalibrationError: no such file, not an artefact, another schema, another kind, or another model's.
    """
    content = _read(Path(path))
    remake = f"make one with `fastkv-vllm calibrate {MAKERS[kind]}`"
    if content["schema"] != SCHEMA:
        raise CalibrationError(
            f"{path} must have schema {SCHEMA}, the one this version reads; it has {content['schema']!r}: {remake}"
        )
    wrong = sorted(set(content) ^ set(Artefact.__dataclass_fields__))
    if wrong:
        raise CalibrationError(f"{path} must have the fields of schema {SCHEMA}; {', '.join(wrong)} differ: {remake}")
    if content["kind"] != kind:
        raise CalibrationError(f"{path} must be of kind {kind!r}; it is of kind {content['kind']!r}: {remake}")
    fingerprint = model_fingerprint(model)
    if content["fingerprint"] != fingerprint:
        raise CalibrationError(
            f"{path} must have been made for the model it is used with ({model_directory(model).resolve().name}, "
            f"{_short(fingerprint)}); it was made for {content['model']} ({_short(content['fingerprint'])}): {remake}"
        )
    return Artefact(**content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` so that the file is either the old or the new one, whenever the process ends."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, allow_nan=False, indent=1) + "\n")
    os.replace(unfinished, path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CalibrationError(f"an artefact must be a file; {path} is none: make it with `fastkv-vllm calibrate`")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or "schema" not in content:
        raise CalibrationError(
            f"{path} must be an artefact, a JSON object with a schema; it is not: make it with `fastkv-vllm calibrate`"
        )
    return content


def _short(fingerprint: object) -> str:
    return str(fingerprint)[:19]
