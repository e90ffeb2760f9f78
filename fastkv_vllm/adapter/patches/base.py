"""A patch of one upstream symbol: checked, idempotent, undoable."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """Wraps one method of an upstream class.

    Fields:
        owner: class that defines the method.
        name: name of the method.
        parameters: parameter names the wrapper was written against; a difference is refused.
        wrap: (original function) -> replacement; it calls the original and never copies it.
        reason: symptom, change, and when the patch can go.
    """

    owner: type
    name: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str

    def install(self) -> None:
        """Replace the method; does nothing where it is in place.

        Raises:
            RuntimeError: the method is missing, has other parameters, or carries another patch of ours.
        """
        current = self.owner.__dict__.get(self.name)
        function = current.__func__ if isinstance(current, staticmethod | classmethod) else current
        if function is None:
            raise RuntimeError(f"{self.owner.__qualname__}.{self.name} does not exist in this vLLM")
        if hasattr(function, "__fastkv_original__"):
            if vars(function)["__fastkv_wrap__"] is not self.wrap:
                raise RuntimeError(f"{self.owner.__qualname__}.{self.name} carries another patch of ours")
            return
        found = tuple(inspect.signature(function).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise RuntimeError(
                f"{self.owner.__qualname__}.{self.name} has parameters {found}, expected {self.parameters}"
            )
        replacement = functools.wraps(function)(self.wrap(function))
        replacement.__fastkv_original__ = current  # type: ignore[attr-defined]
        replacement.__fastkv_wrap__ = self.wrap  # type: ignore[attr-defined]
        kind = type(current) if isinstance(current, staticmethod | classmethod) else (lambda f: f)
        setattr(self.owner, self.name, kind(replacement))

    def uninstall(self) -> None:
        """Put the original back; does nothing where it is in place."""
        current = self.owner.__dict__.get(self.name)
        function = current.__func__ if isinstance(current, staticmethod | classmethod) else current
        original = getattr(function, "__fastkv_original__", None)
        if original is not None:
            setattr(self.owner, self.name, original)
