"""Write down the signatures of what the adapter touches, and the table of what the next release changes."""

import functools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from fastkv_vllm.adapter.version import vllm_version
from tests.contract.source import Source
from tests.contract.touched import touched

Signatures = dict[str, dict[str, str | None]]

RECORD = Path(__file__).with_name("signatures.json")
PAGE = Path(__file__).parents[2] / "docs" / "upgrading.md"
HEADING = "## What the next release changes\n"


@functools.cache
def installed() -> Source:
    """The vLLM of this environment, not imported."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vLLM is installed"
    return Source(Path(spec.origin).parents[1])


def supported() -> str:
    """Release the adapter is written for: the installed one, without the label of its build."""
    return vllm_version().split("+")[0]


def signatures(source: Source) -> Signatures:
    """Symbol -> signature in `source`, of what the adapter touches in the installed release."""
    found = touched(installed())
    return {
        how: {symbol: source.signature(symbol) for symbol in sorted(symbols)}
        for how, symbols in (("overridden", found.overridden), ("used", found.used))
    }


def table(record: dict[str, Signatures]) -> str:
    """Differences between the supported release and each other one, as Markdown."""
    ours, parts = record[supported()], []
    for version, theirs in record.items():
        if version == supported():
            continue
        rows = [f"| symbol | we | {supported()} | {version} |", "|---|---|---|---|"]
        missing = []
        for how, symbols in ours.items():
            word = {"overridden": "override", "used": "use"}[how]
            for symbol, before in symbols.items():
                if symbol not in theirs[how]:
                    missing.append(f"`{symbol}`")
                elif theirs[how][symbol] != before:
                    cells = [f"`{text}`" if text else "not there" for text in (symbol, before, theirs[how][symbol])]
                    cells = [cell.replace("|", "\\|") for cell in cells]
                    rows.append(f"| {cells[0]} | {word} | {cells[1]} | {cells[2]} |")
        if missing:
            rows += ["", f"Not looked up in {version} yet: {', '.join(missing)}."]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for path in map(Path, sys.argv[1:]):
        record[path.name.split("-")[1]] = signatures(Source(path))
    record[supported()] = signatures(installed())
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(PAGE.read_text().split(HEADING)[0] + HEADING + "\n" + table(record))


if __name__ == "__main__":
    main()
