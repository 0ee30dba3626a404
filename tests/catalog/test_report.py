"""The report: exact numbers, bounded pictures, a page that is whole, harmless, and the same every time."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.report.charts import FAMILY_COLOURS, Axis, spacing_chart
from catalog.report.facts import FINEST_STEP, MOST_MARKS, report_facts
from catalog.report.page import render_page, with_code
from catalog.report.pictures import BYTES_OF_ONE, MOST_OF_A_GROUP, MOST_PICTURES, allotment
from catalog.spacing import da_level
from catalog.write import merge_dataset
from tests.browser import browser
from tests.commands import run
from tests.conftest import REPOSITORY

LIMIT = 5_000_000
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"
VOID = {"meta", "img", "input", "br", "link"}
OMITTED = {"th"}
"""Elements whose end tag HTML lets one leave out, where the page does so."""


def noise(number: int, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image(dataset: str, number: int, modality: str | None = "CT", **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    between, pixel = float(rng.uniform(0.8, 6)), float(rng.uniform(0.4, 1.2))
    low = float(rng.uniform(-1024, -900)) if modality == "CT" else 0.0
    return {
        "dataset": dataset,
        "key": f"case-{number:04}",
        "subject": f"s{number // 2}",
        "status": "ingested",
        "modality": modality,
        "dimension": 3,
        "da_level": da_level(between / pixel),
        "shape_c": 1,
        "shape_d": int(rng.integers(20, 400)),
        "shape_h": 512,
        "shape_w": int(rng.integers(300, 512)),
        "spacing_z": between,
        "spacing_y": pixel,
        "spacing_x": pixel,
        "intensity_p0_5": low,
        "intensity_median": low + 400,
        "intensity_p99_5": low + 2000,
        "stored_bytes": 10**6,
        "sampling_weight": 1.0,
        "split": "train",
        "source_path": "p",
        "entry_hash": "e",
        "normalisation_version": 1,
        **changes,
    }


FLAT = {"dimension": 2, "da_level": 5, "shape_d": 1, "spacing_z": None, "spacing_y": None, "spacing_x": None}


def put(corpus: Corpus, dataset: str, rows: list[dict[str, Any]], shape: tuple[int, ...] = (96, 292)) -> None:
    pictures = [
        {"dataset": dataset, "key": row["key"], "preview": noise(number, shape)}
        for number, row in enumerate(rows)
        if row["status"] == "ingested"
    ]
    merge_dataset(corpus, dataset, rows, pictures)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two datasets: 20 CT, 3 T1 and 2 excluded images; 9 X-rays, one without spacing, and 1 failed image."""
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    bad = {"status": "excluded", "reason": "uneven_slices", "message": "gap", "split": "train"}
    torn = {"status": "failed", "reason": "unreadable", "message": "end of file", "split": "train"}
    put(
        corpus,
        "abdomen",
        [
            *(image("abdomen", number) for number in range(20)),
            *(image("abdomen", number, "MRI/T1") for number in range(20, 23)),
            *(image("abdomen", number, **bad) for number in (23, 24)),
        ],
    )
    pixels = {"spacing_y": 0.2, "spacing_x": 0.2}
    put(
        corpus,
        "chest",
        [
            *(image("chest", number, "XR", **(FLAT | pixels)) for number in range(8)),
            image("chest", 8, "XR", **FLAT),
            image("chest", 9, "XR", **torn),
        ],
        (96, 90, 3),
    )
    return corpus


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus whose every text tries to break out of the page."""
    corpus = Corpus(tmp_path_factory.mktemp("hostile"))
    name = HOSTILE.replace("/", "_")  # an id is a folder's name
    shut = {"status": "excluded", "reason": HOSTILE, "split": "train"}
    rows = [image(name, 0, HOSTILE, key=HOSTILE), image(name, 1, None), image(name, 2, **shut)]
    put(corpus, name, rows)
    return corpus


class Page(HTMLParser):
    """The page in pieces; raises where its elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._open and self._open[-1] in OMITTED and tag in {"th", "td"}:
            self._open.pop()
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1] in OMITTED and tag != self._open[-1]:
            self._open.pop()
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(corpus: Corpus, where: str | None = None) -> tuple[str, Page]:
    text = render_page(report_facts(corpus, where))
    return text, Page(text)


def test_facts_are_those_of_the_catalog(corpus: Corpus) -> None:
    facts = report_facts(corpus, meanings={"unreadable": "could not be read"})
    assert facts["totals"]["ingested"] == 32
    assert (facts["totals"]["excluded"], facts["totals"]["failed"]) == (2, 1)
    assert [(row["modality"], row["images"]) for row in facts["modalities"]] == [
        ("CT", 20),
        ("XR", 9),
        ("MRI/T1", 3),
    ]
    assert [(row["reason"], row["images"], row["datasets"], row["meaning"]) for row in facts["reasons"]] == [
        ("uneven_slices", 2, [("abdomen", 2)], None),
        ("unreadable", 1, [("chest", 1)], "could not be read"),
    ]
    ct, t1, xr = facts["intensities"]
    lows = [image("abdomen", number)["intensity_p0_5"] for number in range(20)]
    assert ct["intensity_p0_5"] == pytest.approx(np.quantile(lows, (0.05, 0.5, 0.95)))
    assert (t1["modality"], t1["images"], t1["intensity_p99_5"]) == ("MRI/T1", 3, [2000.0] * 3)
    assert (xr["dataset"], xr["images"]) == ("chest", 9)


def test_suspects_are_shown_beside_usual_images(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    usual = {"spacing_z": 2.0, "spacing_y": 0.7, "spacing_x": 0.7, "shape_d": 100, "shape_w": 512}
    rows = [image("abdomen", number, **usual) for number in range(30)]
    rows[7] |= {"spacing_z": 20.0}
    put(corpus, "abdomen", rows)
    text, page = page_of(corpus)
    shown = [item for item in page.all("img") if item["alt"] == "unusual spacing: case-0007"]
    assert len(shown) == 1
    assert "A usual image: case-" in text
    assert {"href": "#outliers"} in page.all("a")
    assert "Outliers and suspects" not in page_of(corpus, "spacing_z < 10")[0]


def test_what_stands_in_backticks_is_code_and_nothing_else_is_markup() -> None:
    assert with_code("type `a --b <id>` & `c`") == "type <code>a --b &lt;id&gt;</code> &amp; <code>c</code>"
    assert with_code("<b>one ` alone") == "&lt;b&gt;one ` alone"


def test_a_condition_narrows_everything(corpus: Corpus) -> None:
    facts = report_facts(corpus, "modality = 'CT' and status = 'ingested'")
    assert facts["totals"]["discovered"] == facts["spacings"]["images"] == facts["sheet"]["images"] == 20
    assert [row["dataset"] for row in facts["datasets"]] == ["abdomen"]
    assert [(row["modality"], row["images"]) for row in facts["intensities"]] == [("CT", 20)]
    whole = report_facts(corpus)
    (abdomen, _), (same,) = whole["sheet"]["datasets"], facts["sheet"]["datasets"]
    assert [picture["key"] for picture in same["groups"][0]["pictures"]] == [
        picture["key"] for picture in abdomen["groups"][0]["pictures"]
    ]


def test_every_3d_image_is_counted_at_its_spacing(corpus: Corpus) -> None:
    spacings = report_facts(corpus)["spacings"]
    assert spacings["images"] == sum(mark["images"] for mark in spacings["marks"]) == 23
    near = 2 ** (0.5 / FINEST_STEP) * (1 + 1e-9)
    left = Counter(dict.fromkeys(range(23), 1))
    for mark in spacings["marks"]:
        at = [
            number
            for number in left
            for row in [image("abdomen", number, "MRI/T1" if number >= 20 else "CT")]
            if row["modality"].startswith(mark["family"])
            and 1 / near <= row["spacing_z"] / mark["between"] <= near
            and 1 / near <= row["spacing_y"] / mark["in_plane"] <= near
        ]
        assert len(at) == mark["images"]
        left.subtract(at)
    assert not any(left.values())


def test_marks_are_bounded_and_still_count_all(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    rng = np.random.default_rng(0)
    rows = [
        image("many", number, spacing_z=float(z), spacing_y=float(x), spacing_x=float(x))
        for number, (z, x) in enumerate(2 ** rng.uniform(-5, 5, (6000, 2)))
    ]
    merge_dataset(corpus, "many", rows, [])
    spacings = report_facts(corpus)["spacings"]
    assert len(spacings["marks"]) <= MOST_MARKS
    assert spacings["step"] < FINEST_STEP
    assert spacings["images"] == 6000


def test_more_families_than_colours_share_the_last() -> None:
    marks = [
        {"family": f"m{number:02}", "in_plane": 1.0, "between": 1.0, "images": 99 - number, "datasets": []}
        for number in range(FAMILY_COLOURS + 3)
    ]
    colours = [family["colour"] for family in spacing_chart({"marks": marks})["families"]]
    assert colours == [*range(FAMILY_COLOURS), *[FAMILY_COLOURS - 1] * 3]


def test_diagonals_lie_where_their_da_is() -> None:
    marks = [
        {"family": "CT", "in_plane": x, "between": z, "images": 1, "datasets": []}
        for x, z in ((0.3, 0.3), (2.0, 10.0))
    ]
    chart = spacing_chart({"marks": marks})
    across = Axis(0.3 / 1.25, 2.5, chart["left"], chart["right"])
    deep = Axis(0.3 / 1.25, 12.5, chart["bottom"], chart["top"])
    assert [line["label"] for line in chart["diagonals"]] == [f"DA {2**level}" for level in range(6)]
    for level, line in enumerate(chart["diagonals"]):
        for x, y in (("x1", "y1"), ("x2", "y2")):
            share_x = (line[x] - across.start) / (across.end - across.start)
            share_y = (line[y] - deep.start) / (deep.end - deep.start)
            in_plane = across.low * (across.high / across.low) ** share_x
            between = deep.low * (deep.high / deep.low) ** share_y
            assert between / in_plane == pytest.approx(2**level, rel=0.01)


def test_pictures_are_a_stated_part_of_the_images(corpus: Corpus) -> None:
    sheet = report_facts(corpus)["sheet"]
    assert (sheet["shown"], sheet["images"]) == (6 + 3 + 6, 32)
    abdomen, chest = sheet["datasets"]
    assert [(group["modality"], len(group["pictures"])) for group in abdomen["groups"]] == [
        ("CT", 6),
        ("MRI/T1", 3),
    ]
    keys = [picture["key"] for picture in abdomen["groups"][0]["pictures"]]
    assert keys == [f"case-{number:04}" for number in (1, 5, 8, 11, 15, 18)]
    for dataset, size in ((abdomen, (292, 96)), (chest, (90, 96))):
        picture = dataset["groups"][0]["pictures"][0]
        data = base64.b64decode(picture["source"].partition(",")[2], validate=True)
        assert (picture["width"], picture["height"]) == size
        assert len(data) <= BYTES_OF_ONE
        with Image.open(io.BytesIO(data)) as shown:
            assert (shown.format, shown.size) == ("WEBP", size)


def test_pictures_are_bounded_however_many_groups() -> None:
    sizes: dict[tuple[str, str | None], int] = {(f"d{n}", "CT"): n + 1 for n in range(2 * MOST_PICTURES)}
    for groups in (3, 55, 300, MOST_PICTURES, 2 * MOST_PICTURES):
        given = allotment(dict(list(sizes.items())[:groups]))
        assert sum(given.values()) <= MOST_PICTURES
        assert max(given.values()) <= MOST_OF_A_GROUP
        assert all(given[group] <= sizes[group] for group in given)
    assert [group for group, count in given.items() if count == 0] == [
        (f"d{n}", "CT") for n in reversed(range(MOST_PICTURES))
    ]


def test_a_damaged_preview_names_the_image(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    merge_dataset(
        corpus, "one", [image("one", 0)], [{"dataset": "one", "key": "case-0000", "preview": b"text"}]
    )
    with pytest.raises(SetupError, match=r"one/case-0000 is no PNG.*verify one --repair"):
        report_facts(corpus)


def test_a_corpus_without_pictures_or_images_has_a_page(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    shut = {"status": "excluded", "reason": "constant", "dimension": None, "da_level": None}
    merge_dataset(corpus, "none", [image("none", 0, **shut)], [])
    text, page = page_of(corpus)
    assert page.texts["h2"] == ["In numbers", "Datasets", "Exclusions and failures"]
    assert "constant" in text
    merge_dataset(corpus, "bare", [image("bare", 0)], [])
    _, page = page_of(corpus)
    assert "Pictures" not in page.texts["h2"]
    assert "Spacing of the 3-D images" in page.texts["h2"]
    assert page_of(corpus, "false")[1].texts["h2"] == ["In numbers", "Datasets"]


def test_structure_that_readers_of_all_kinds_need(corpus: Corpus) -> None:
    text, page = page_of(corpus)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)][:3] == ["h1", "h2", "h2"]
    tables = len(page.all("table"))
    assert tables == len(page.all("caption")) == 5
    assert all(head.get("scope") in {"col", "row"} for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        named = f"{attributes.get('aria-labelledby') or ''} {attributes.get('aria-describedby') or ''}".split()
        assert set(named) <= set(ids)
        assert (attributes.get("href") or "#main").removeprefix("#") in ids
    for chart in page.all("svg"):
        assert chart.get("aria-hidden") == "true" or (chart.get("role") == "img" and chart["aria-labelledby"])
    alts = [picture["alt"] or "" for picture in page.all("img")]
    assert len(alts) == 15
    assert len(set(alts)) == 15
    assert alts[0] == "CT, three middle planes: case-0001"
    assert "15 of 32 images shown" in text
    assert "1 of 1 image shown" not in text


def test_numbers_of_the_page(corpus: Corpus) -> None:
    _, page = page_of(corpus)
    tiles = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert tiles["images"] == "32"
    assert (tiles["datasets"], tiles["excluded"], tiles["failed"]) == ("2", "2", "1")
    rows = [" ".join(row.split()) for row in page.texts["tr"]]
    assert any(re.match(r"CT ?20 ?62\.5 %", row) for row in rows)
    marks = json.loads(page.texts["script"][0])
    assert sum(mark["images"] for mark in marks) == 23
    assert len(page.all("circle")) == len(marks) + len({mark["family"] for mark in marks})


def test_nothing_of_the_catalog_becomes_markup(hostile: Corpus) -> None:
    text, page = page_of(hostile, "key <> '<script>'")
    assert len(page.all("script")) == len(page.all("style")) + 1 == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all((picture["src"] or "").startswith("data:image/webp;base64,") for picture in page.all("img"))
    assert any(HOSTILE in (picture["alt"] or "") for picture in page.all("img"))
    assert HOSTILE in page.texts["h4"][0]
    assert HOSTILE in page.texts["code"]
    (mark, _) = sorted(json.loads(page.texts["script"][0]), key=lambda mark: mark["family"])
    assert mark["family"] == HOSTILE.partition("/")[0]
    assert "<script>alert" not in text
    assert "49" not in page.texts["h4"][0]


def test_the_page_needs_nothing_from_elsewhere(corpus: Corpus) -> None:
    text, page = page_of(corpus)
    assert not re.findall(r"https?:|@import|url\(|//[a-z]+\.", re.sub(r"base64,[\w+/=]+", "", text))
    assert not page.all("link")
    policy = page.all("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_same_corpus_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    again = Corpus(tmp_path)
    for dataset in reversed(corpus.datasets()):
        (again.root / f"catalog/dataset={dataset}").mkdir(parents=True)
        for place in (Corpus.preview_file, Corpus.catalog_file):
            place(again, dataset).write_bytes(place(corpus, dataset).read_bytes())
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    for where, target in ((corpus, first), (again, second)):
        done = run("pumit-data", "report", "--data", where.root, "--output", target)
        assert done.returncode == 0, done.stderr
        assert "15 of 32 images" in done.stdout
        assert target.name in done.stdout
    assert first.read_bytes() == second.read_bytes()
    assert "Slice positions along the normal are not evenly spaced." in first.read_text()


def test_a_place_that_cannot_be_written_ends_with_one_line(corpus: Corpus, tmp_path: Path) -> None:
    done = run("pumit-data", "report", "--data", corpus.root, "--output", tmp_path / "no" / "page.html")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_55_datasets_of_incompressible_pictures_stay_below_the_limit(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    previews = [noise(number, (96, 292, 3) if number % 2 else (96, 292)) for number in range(8)]
    for number in range(55):
        dataset = f"collection-{number:02}"
        modalities = ("CT", "MRI/T1", "MRI/T2", "US", "XR")[number % 3 :]
        rows = [
            image(dataset, 20 * number + n, modalities[n % len(modalities)], key=f"{'long-name-' * 8}{n:03}")
            for n in range(20)
        ]
        pictures = [
            {"dataset": dataset, "key": row["key"], "preview": previews[n % len(previews)]}
            for n, row in enumerate(rows)
        ]
        merge_dataset(corpus, dataset, rows, pictures)
    text, page = page_of(corpus)
    assert 3 * 55 <= len(page.all("img")) <= MOST_PICTURES
    assert len(text.encode()) < LIMIT


def test_the_wheel_carries_template_style_and_script() -> None:
    pytest.importorskip("hatchling", reason="no hatchling here, which builds the wheel")
    from hatchling.builders.wheel import WheelBuilder

    built = next(iter(WheelBuilder(str(REPOSITORY)).build(directory=str(REPOSITORY / "build/report-wheel"))))
    try:
        with zipfile.ZipFile(built) as wheel:
            names = wheel.namelist()
    finally:
        Path(built).unlink()
        Path(built).parent.rmdir()
    assert {f"catalog/report/report.{kind}" for kind in ("html", "css", "js")} <= set(names)


def test_in_a_browser(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page(report_facts(corpus)), encoding="utf-8")
    with browser(tmp_path / "profile") as page:
        page.open(file)
        rows = "[...document.querySelectorAll('[data-find]')].filter((e) => e.checkVisibility()).length"
        whole = page.run(rows)
        assert whole == 2 + 3 + 2 + 3 + 2 + 3
        assert page.run("[...document.images].every((image) => image.complete && image.naturalWidth > 50)")

        field = "document.getElementById('find')"
        page.run(f"{field}.value = 'ABD mri'; {field}.dispatchEvent(new Event('input'))")
        assert page.run(rows) == 1 + 1
        assert page.run("document.querySelectorAll('.sheet:not([hidden]) img').length") == 9
        assert page.run("document.getElementById('found').value").startswith(f"2 of {whole} rows")
        page.run(f"{field}.value = ''; {field}.dispatchEvent(new Event('input'))")
        assert page.run(rows) == whole

        order = "[...document.querySelectorAll('#modalities ~ div tbody th')].map((e) => e.textContent)"
        head = "document.querySelectorAll('#modalities ~ div thead th')"
        assert page.run(order) == ["CT", "XR", "MRI/T1"]
        page.run(f"{head}[1].firstChild.click()")
        assert page.run(order) == ["CT", "XR", "MRI/T1"]
        page.run(f"{head}[1].firstChild.click()")
        assert page.run(order) == ["MRI/T1", "XR", "CT"]
        assert page.run(f"{head}[1].getAttribute('aria-sort')") == "ascending"
        page.run(f"{head}[0].firstChild.click()")
        assert page.run(order) == ["CT", "MRI/T1", "XR"]

        page.run(
            "document.querySelector('[data-mark]').dispatchEvent("
            "new PointerEvent('pointermove', {bubbles: true, clientX: 9, clientY: 9}))"
        )
        assert re.fullmatch(
            r"(CT|MRI), [\d.]+ mm in-plane, [\d.]+ mm between slices: \d+ images? \(abdomen \d+\)",
            page.run("document.getElementById('tip').textContent"),
        )
        page.run("document.querySelector('[data-shows]').click()")
        assert page.run("getComputedStyle(document.getElementById('family-1')).display") == "none"

        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        paper = "getComputedStyle(document.body).backgroundColor"
        assert page.run(paper) == "rgb(255, 255, 255)"
        page.run("document.getElementById('theme').click()")
        assert page.run(paper) == "rgb(20, 23, 27)"
        page.call("Emulation.setEmulatedMedia", media="print", features=[])
        assert page.run(paper) == "rgb(255, 255, 255)"
        assert page.run("document.getElementById('finder').checkVisibility()") is False

        assert page.troubles() == []
        assert page.requested() == [file.resolve().as_uri()]


def test_hostile_texts_do_nothing_in_a_browser(hostile: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page(report_facts(hostile)), encoding="utf-8")
    with browser(tmp_path / "profile") as page:
        page.open(file)
        assert page.run("document.querySelector('h4').textContent").startswith(HOSTILE)
        assert page.run("document.scripts.length") == 2
        # What stands in the page may not run even if it came to be markup.
        ran = page.run(
            "new Promise((done) => {"
            "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.ran = 1\">');"
            "document.body.lastChild.addEventListener('error', () => done(window.ran));"
            "})"
        )
        assert ran is None
        assert any("script-src" in str(trouble) for trouble in page.troubles())
        assert page.requested() == [file.resolve().as_uri()]
