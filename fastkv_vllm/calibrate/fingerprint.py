"""Which model an artefact belongs to: a short hash of a checkpoint's shape and of a sample of its weights."""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from fastkv_vllm.calibrate.errors import CalibrationError

INDEX_FILE = "model.safetensors.index.json"
SAMPLE_BYTES = 256
MAX_SAMPLES = 1024  # tensors read; a mixture of experts has tens of thousands
_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "sliding_window",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def model_directory(model: str | Path) -> Path:
    """Directory of a checkpoint given as a directory or as the name of a model in the local Hugging Face cache.

    Raises:
        CalibrationError: neither; nothing is downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise CalibrationError(
            "the model must be a checkpoint's directory or a name in the local Hugging Face cache; "
            f"got {str(model)!r}: download it first"
        ) from None


def model_fingerprint(model: str | Path) -> str:
    """Fingerprint of a checkpoint, from what decides its attention and from some bytes of every tensor.

    The same however the checkpoint is named, split over files or re-saved by another version of transformers; another
    one after any training step or change of dtype. A few hundred bytes are read per tensor, so large models take
    seconds.

    Args:
        model: directory, or name in the local Hugging Face cache.

    Returns:
        "sha256:" and 64 hexadecimal digits.

    Raises:
        CalibrationError: no checkpoint there, or none in safetensors.
    """
    directory = model_directory(model)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CalibrationError(f"a model's directory must hold config.json; {directory} has none: name a checkpoint")
    digest = hashlib.sha256(json.dumps(architecture(json.loads(config_file.read_text())), sort_keys=True).encode())
    tensors = sorted(_tensors(directory))
    for name, dtype, shape, *_ in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
    step = -(-len(tensors) // MAX_SAMPLES)
    for _, _, _, file, begin, end in tensors[::step]:
        digest.update(_middle(Path(file), begin, end))
    return f"sha256:{digest.hexdigest()}"


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that decide what attention sees, whichever version wrote them."""
    text = config.get("text_config") or config
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_theta", text.get("rope_theta"))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    num_heads = text.get("num_attention_heads")
    head_dim = text.get("head_dim") or (num_heads and text["hidden_size"] // num_heads)
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    known = {name: text.get(name) for name in _FIELDS}
    return {**known, "num_key_value_heads": num_kv_heads, "head_dim": head_dim, "rope": rope}


def _tensors(directory: Path) -> Iterator[tuple[str, str, list[int], str, int, int]]:
    """Name, dtype, shape, file, first and last byte in it of every tensor of the checkpoint."""
    for file in _weight_files(directory):
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
                yield name, entry["dtype"], entry["shape"], str(file), begin, end


def _weight_files(directory: Path) -> list[Path]:
    """The files transformers would read; others (a second copy in another layout) may lie beside them."""
    index, single = directory / INDEX_FILE, directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CalibrationError(
                f"{INDEX_FILE} names {', '.join(missing)}, which must lie in {directory}: download the whole model"
            )
        return files
    if single.is_file():
        return [single]
    raise CalibrationError(
        f"weights must be safetensors (model.safetensors or {INDEX_FILE}); {directory} has neither: convert them"
    )


def _middle(file: Path, begin: int, end: int) -> bytes:
    size = min(SAMPLE_BYTES, end - begin)
    with file.open("rb") as stream:
        stream.seek((begin + end - size) // 2)
        return stream.read(size)
