"""The one list of compression methods: a class decorator fills it, everything else reads it."""

from collections.abc import Callable

from fastkv_vllm.methods.base import Method

_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method class under its command-line name; a second use of a name is an error."""

    def add(cls: type[Method]) -> type[Method]:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is already registered by {_METHODS[name].__qualname__}")
        _METHODS[name] = cls
        return cls

    return add


def method_names() -> tuple[str, ...]:
    """Names of all registered methods, in order of registration."""
    return tuple(_METHODS)


def method_class(name: str) -> type[Method]:
    """Class registered under `name`.

    Raises:
        ValueError: no such method; the message lists all names.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown compression method {name!r}; known: {', '.join(_METHODS)}")
    return _METHODS[name]
