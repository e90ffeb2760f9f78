"""Offline artefacts of methods: what is measured once per model, and the file that carries it."""

from fastkv_vllm.calibrate.artefact import Artefact, load, save
from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.fingerprint import model_fingerprint

__all__ = ["Artefact", "CalibrationError", "load", "model_fingerprint", "save"]
