"""The status page as HTML: one file without scripts, legible in light and dark."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

REFRESH_S = 15
_LEVELS = 10  # shades of the map
_LEFT, _WIDTH, _RIGHT = 44, 880, 76  # of the map: layers, entries, share kept
_STYLE = """
:root { color-scheme: light dark; --text: #1b2430; --soft: #556172; --line: #d5dbe3; --back: #fff; --none: #e6eaf0;
  --kept: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8ebf0; --soft: #a3aebd; --line: #39424f; --back: #14181e; --none: #262e39; --kept: #6cb6ff; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { color: var(--soft); margin: .25rem 0 .75rem; }
table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem 0 .25rem 2rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.pairs td { text-align: left; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
svg { width: 100%; min-width: 40rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.none { fill: var(--none); } .end { text-anchor: end; } .middle { text-anchor: middle; }
svg path { stroke: var(--kept); } svg .line { stroke: var(--back); stroke-width: 2; }
.tick { stroke: var(--soft); } .swatch { fill: var(--kept); }
"""
_METHODS = {
    "requests_compressed": "prompts",
    "prompt_tokens_seen": "tokens seen",
    "prompt_tokens_kept": "kept per head",
    "blocks_freed": "blocks given back",
    "decode_blocks_freed": "later, decoding",
}


@dataclass(frozen=True)
class Status:
    """What the page shows.

    Fields:
        model: name it is served by.
        settings: what is on; None: no compression.
        figures: as `status.figures` gives them.
        engine_answers: the engine said in time what it kept last.
        num_engines: replicas of this server; the map is the first one's.
        last: as `kept.merged` gives it; None: nothing was compressed yet.
    """

    model: str
    settings: Mapping[str, Any] | None
    figures: Mapping[str, Mapping[str, float]]
    engine_answers: bool
    num_engines: int
    last: Mapping[str, Any] | None


def render(status: Status) -> str:
    """The status as a page."""
    parts = [
        f"<h1>KV-cache compression is {'off' if status.settings is None else 'on'}</h1>",
        f"<p>{escape(status.model)} &middot; read at {time.strftime('%H:%M:%S %Z')}, again every {REFRESH_S} s</p>",
        f"<h2>Now</h2>{_now(status.figures)}",
    ]
    if status.settings is not None:
        parts += [
            f"<h2>Compressed prompts since the start</h2>{_methods(status.figures)}{_others(status.figures)}",
            f"<h2>What stayed of the last compressed prompt</h2>{_last(status)}",
            f"<h2>Settings of the server</h2>{_pairs(status.settings)}",
        ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fastkv-vllm</title>"
        f"<meta http-equiv='refresh' content='{REFRESH_S}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _now(figures: Mapping[str, Mapping[str, float]]) -> str:
    rows = {
        "requests running": _count(_of(figures, "num_requests_running")),
        "requests waiting": _count(_of(figures, "num_requests_waiting")),
        "KV cache in use": _percent(_of(figures, "kv_cache_usage_perc")),
    }
    if stash := _of(figures, "fastkv_stash_bytes"):
        rows["rows waiting for their prompt's end, or to come back"] = f"{stash / 2**20:,.1f} MiB"
    return _pairs(rows)


def _methods(figures: Mapping[str, Mapping[str, float]]) -> str:
    """One row for each method that has compressed something or is the server's."""
    columns = {name: figures.get(f"fastkv_{name}", {}) for name in _METHODS}
    rows = []
    for method in sorted(columns["requests_compressed"]):
        values = [column.get(method, 0.0) for column in columns.values()]
        seen, kept = values[1:3]
        rows.append([method, *map(_count, values[:3]), _percent(kept / seen) if seen else "", *map(_count, values[3:])])
    heads = [*_METHODS.values()]
    return _table(["method", *heads[:3], "share kept", *heads[3:]], rows)


def _others(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Prompts left alone, rows that went on after cuts or came back, and what choosing cost."""
    rows = {
        f"prompts left alone: {reason.replace('_', ' ')}": _count(value)
        for reason, value in figures.get("fastkv_requests_left_alone", {}).items()
        if value
    }
    if into := _of(figures, "fastkv_tsp_rows_in"):
        out = _of(figures, "fastkv_tsp_rows_out")
        rows["rows that went on after cuts"] = f"{_count(out)} of {_count(into)} ({_percent(out / into)})"
    rows |= {
        f"prompts cut after layer {layer}": _count(value)
        for layer, value in sorted(figures.get("fastkv_cuts", {}).items(), key=lambda item: int(item[0]))
    }
    if back := _of(figures, "fastkv_revived_rows"):
        rows["rows that came back while decoding"] = _count(back)
    spent = {act: _of(figures, f"fastkv_{act}_seconds") for act in ("score", "select", "compact")}
    if sum(spent.values()):
        words = zip(("scoring", "selecting", "moving"), spent.values(), strict=True)
        rows["time spent, first worker"] = ", ".join(f"{word} {seconds:,.2f} s" for word, seconds in words)
    return _pairs(rows) if rows else ""


def _last(status: Status) -> str:
    if not status.engine_answers:
        return "<p>The engine is in the middle of a long step and has not answered; look again.</p>"
    last = status.last
    if last is None:
        return "<p>None yet.</p>"
    mean = sum(map(sum, last["num_kept"])) / sum(map(len, last["num_kept"]))
    of_engine = " &middot; first of the server's engines" if status.num_engines > 1 else ""
    return (
        f"<p>{escape(last['method'])} &middot; {last['num_tokens']:,} tokens, {mean:,.0f} of them kept per layer and "
        f"head ({_percent(mean / last['num_tokens'])}) &middot; {_ago(time.time() - last['time_s'])}{of_engine}</p>"
        f"{_map(last)}"
    )


def _map(last: Mapping[str, Any]) -> str:
    """A row per layer and KV head, the first layer on top; the prompt runs from left to right."""
    layers, num_heads = last["shares"], len(last["shares"][0])
    height = max(3, min(12, 640 // (len(layers) * num_heads)))
    of_layer, top = height * num_heads, 22
    bottom = top + of_layer * len(layers)
    every = math.ceil(15 / of_layer)  # layers between two labels, which need 15 px
    parts = [
        f"<text x='0' y='14'>layer</text><text class='end' x='{_LEFT + _WIDTH + _RIGHT}' y='14'>kept</text>",
        f"<rect class='none' x='{_LEFT}' y='{top}' width='{_WIDTH}' height='{bottom - top}'/>",
        *_shades([head for layer in layers for head in layer], top, height),
    ]
    for index, counts in enumerate(last["num_kept"]):
        y = top + index * of_layer
        if index:
            parts.append(f"<path class='line' d='M{_LEFT} {y}h{_WIDTH}'/>")
        if index % every == 0:
            share = sum(counts) / len(counts) / last["num_tokens"]
            middle = y + of_layer / 2 + 4
            parts.append(f"<text x='0' y='{middle:g}'>{index}</text>")
            parts.append(f"<text class='end' x='{_LEFT + _WIDTH + _RIGHT}' y='{middle:g}'>{_percent(share)}</text>")
    for quarter in range(5):
        x = _LEFT + _WIDTH * quarter / 4
        parts.append(f"<path class='tick' d='M{x:g} {bottom}v5'/>")
        parts.append(f"<text class='middle' x='{x:g}' y='{bottom + 19}'>{last['num_tokens'] * quarter // 4:,}</text>")
    label = f"Share of entries kept by layer, KV head and position: {len(layers)} layers of {num_heads} heads"
    return (
        f"<div class='wide'><svg viewBox='0 0 {_LEFT + _WIDTH + _RIGHT} {bottom + 50}' role='img' aria-label='{label}'>"
        f"{''.join(parts)}{_legend(bottom + 44, num_heads)}</svg></div>"
    )


def _shades(rows: Sequence[Sequence[float]], top: int, height: int) -> list[str]:
    """Each shade as one path of strokes: neighbours of the same shade are one stroke."""
    width = _WIDTH / len(rows[0])
    strokes: dict[int, list[str]] = {}
    for number, row in enumerate(rows):
        x, y = 0, top + (number + 0.5) * height
        for shade, run in groupby(math.ceil(share * _LEVELS) for share in row):
            count = len(list(run))
            if shade:
                strokes.setdefault(shade, []).append(f"M{_LEFT + x * width:.1f} {y:g}h{count * width:.1f}")
            x += count
    return [
        f"<path d='{''.join(parts)}' stroke-width='{height}' stroke-opacity='{_opacity(shade)}'/>"
        for shade, parts in sorted(strokes.items())
    ]


def _legend(y: int, num_heads: int) -> str:
    """What the shades mean, and the axis."""
    swatches = "".join(
        f"<rect class='{'swatch' if shade else 'none'}' x='{_LEFT + 80 + 16 * shade}' y='{y - 11}' width='16' "
        f"height='12' fill-opacity='{_opacity(shade) if shade else 1}'/>"
        for shade in range(_LEVELS + 1)
    )
    end = _LEFT + 80 + 16 * (_LEVELS + 1)
    heads = f"a row is one of a layer's {num_heads} KV heads" if num_heads > 1 else "a row is a layer"
    return (
        f"<text x='{_LEFT}' y='{y}'>none stay</text>{swatches}"
        f"<text x='{end + 8}' y='{y}'>all stay &#183; {heads}</text>"
        f"<text class='end' x='{_LEFT + _WIDTH}' y='{y}'>position in the prompt [tokens]</text>"
    )


def _opacity(shade: int) -> float:
    return round(0.2 + 0.8 * shade / _LEVELS, 2)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _pairs(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table class='pairs'>{cells}</table>"


def _of(figures: Mapping[str, Mapping[str, float]], name: str) -> float:
    return sum(figures.get(name, {}).values())


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _ago(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s ago" if whole < 120 else f"{whole // 60} min ago" if whole < 7200 else f"{whole // 3600} h ago"
