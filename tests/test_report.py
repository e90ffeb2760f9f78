"""docs/results.md is made from the reports, and the reports have what they must."""

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.kept_map import draw
from fastkv_vllm.methods import method_names

# Those for which a tenth is no budget.
RATIOS = {
    "pyramidinfer": 0.6,
    "lazyllm": 0.5,
    "duoattention": 0.5,
    "dbudgetkv": 0.9,
    "kivi": 1.0,
    "skvq": 1.0,
    "quantspec": 1.0,
    "kvsharer": 1,
    "minicache": 1,
}  # those for which a tenth is no budget
QUALITY = json.loads((report.RESULTS / "quality.json").read_text())


def test_the_page_is_made_from_the_reports() -> None:
    assert report.PAGE.read_text() == report.render(), "run: python -m benchmarks.report"


@pytest.mark.parametrize("method", method_names())
def test_each_method_has_its_row_in_every_column(method: str) -> None:
    def columns(name: str) -> list[list[tuple[str, ...]]]:
        """Of each of its configurations."""
        keys, found = ("task", "group", "protocol", "turns"), dict[str, list[tuple[str, ...]]]()
        for row in QUALITY["rows"]:
            if row["method"] == name:
                found.setdefault(json.dumps(row["config"]), []).append(tuple(row[key] for key in keys))
        return list(found.values())

    (plain,) = columns("none")
    ours = columns(method)
    assert ours and all(each == plain for each in ours)
    name = f"{method} {RATIOS.get(method, 0.1):g}"
    for title in dict.fromkeys(row["protocol"] for row in QUALITY["rows"]):
        assert re.search(rf"^\| {name} ", report.table("quality", title), flags=re.MULTILINE)


def test_images_of_the_page_are_there() -> None:
    names = re.findall(r"\]\((img/[^)]+)\)", report.PAGE.read_text())
    assert names
    for name in names:
        assert (report.PAGE.parent / name).read_text().startswith("<?xml")


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_have_labels_and_units(name: str, tmp_path: Path) -> None:
    source, make = plots.PLOTS[name]
    path = report.RESULTS / source
    figure = make(json.loads(path.read_text()) if path.exists() else QUALITY)
    text = figure._supxlabel.get_text() if figure._supxlabel else figure.axes[0].get_xlabel()
    assert re.search("tokens|ratio|requests|bytes", text)
    label = figure._supylabel.get_text() if figure._supylabel else figure.axes[0].get_ylabel()
    assert re.search(r"share|\[CPU|depth|\[requests", label)
    path = tmp_path / "figure.svg"
    plots.save(figure, path)
    assert path.stat().st_size > 1000


def test_a_kept_map_shows_what_stays() -> None:
    """Two layers of two heads over eight tokens, drawn with a pixel a token."""
    kept = [[[0, 7], [1, 7]], [[2, 7], [3, 7]]]
    figure = draw(kept, 8, "title", [])
    (image,) = figure.axes[0].get_images()
    rows = image.get_array().tolist()
    assert [[i for i, share in enumerate(row) if share] for row in rows] == [*itertools.chain(*kept)]
    assert {share for row in rows for share in row} == {0.0, 1.0}


def test_a_figure_that_is_not_there_stops_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "in"
    template.write_text("{{quality nobody niah 2048 question}}")
    monkeypatch.setattr(report, "TEMPLATE", template)
    with pytest.raises(ValueError, match="not enough values"):
        report.render()
