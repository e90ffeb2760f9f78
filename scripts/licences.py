"""Licences of what the server needs to run, from the metadata of the installed distributions, into docs/licences.md.

python -m scripts.licences

Direct and transitive dependencies without development tools, as installed here: with another build of vLLM or torch
(CUDA) others come in.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "fastkv-vllm"
OURS = "Private :: Do Not Upload"  # a name only, see packaging/
PAGE = Path(__file__).parents[1] / "docs/licences.md"
HEAD = "| distribution | licence | needed by |\n|---|---|---|\n"
_LONGEST = 80  # a licence field that is longer is the licence's text


def main() -> None:
    """Write the table anew below the page's text."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(HEAD)] + table())


def table() -> str:
    """One row for each distribution, by name."""
    rows = [
        f"| {name} | {licence(found)} | {', '.join(sorted(needed_by))} |\n"
        for name, (found, needed_by) in sorted(runtime().items())
        if OURS not in found.metadata.get_all("Classifier", [])
    ]
    return HEAD + "".join(rows)


def runtime() -> dict[str, tuple[Distribution, set[str]]]:
    """Name -> installed distribution that the server needs, and those that need it directly."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    seen, waiting = set(), [(ROOT, frozenset({"cpu", "cuda"}))]
    while waiting:
        name, extras = waiting.pop()
        for needed, needed_extras in requirements(name, extras):
            try:
                found.setdefault(needed, (distribution(needed), set()))[1].add(name)
            except PackageNotFoundError:
                continue  # another build's, or dropped by scripts/setup.sh
            if (needed, needed_extras) not in seen:
                seen.add((needed, needed_extras))
                waiting.append((needed, needed_extras))
    return found


def requirements(name: str, extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str]]]:
    """Distributions that an installed one asks for on this machine, with their extras."""
    for line in distribution(name).requires or ():
        asked = Requirement(line)
        if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield canonicalize_name(asked.name), frozenset(asked.extras)


def licence(found: Distribution) -> str:
    """What a distribution says of its licence: an expression, a classifier, a name, or its file's first line."""
    metadata = found.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    classifiers = [words for words in classifiers if words != "OSI Approved"]  # that alone names none
    named = (metadata.get("License") or "").strip()
    if expression := metadata.get("License-Expression"):
        return expression
    if classifiers:
        return "; ".join(classifiers)
    if named and "\n" not in named and len(named) <= _LONGEST:
        return named
    files = [f for f in found.files or () if f.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
    lines = [line.strip() for file in files[:1] for line in file.read_text().splitlines() if line.strip()]
    return f"file: {lines[0]}" if lines else "not said"


if __name__ == "__main__":
    main()
