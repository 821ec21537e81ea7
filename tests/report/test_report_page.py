"""The page: whole, self-contained, and harmless whatever the runs are called."""

import html.parser
import re
from xml.etree import ElementTree

import pytest

from lora_jax.core.errors import RequestError
from lora_jax.report.figures import draw_figures
from lora_jax.report.page import headline, to_page, write_figures, write_report
from lora_jax.report.runs import read_runs
from lora_jax.report.tables import summarise

VOID = {"meta", "br", "img", "link", "input", "hr"}
FETCHES = {"src", "srcset", "data", "poster", "action", "background", "ping"}


class PageReader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder):
    """The page of a working folder, with few resamples."""
    return to_page(summarise(read_runs(folder), num_resamples=100), folder)


def test_the_page_says_what_was_run_and_what_came_of_it(tmp_path, write_study):
    page = write_report(write_study(tmp_path))
    assert page == tmp_path / "report.html"
    assert (tmp_path / "table.md").read_text().startswith("| method |")
    assert (tmp_path / "table.csv").read_text().startswith("label,method")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cells",
        "report.html",
        "table.csv",
        "table.md",
        "table.tex",
    ]
    text = " ".join(PageReader(page.read_text()).text)
    for expected in (
        "minilm",
        "d" * 64,
        "cpu, 2 threads, x86_64",
        "uncommitted changes",
        "batch_shapes",
        "0123456789abcdef",
        "jax 0.10.2",
        "validation stopped improving",
        "budget of 532 steps ended",
        "95% percentile intervals",
        "--config.method.targets=all-linear",
        "git checkout 0123456789abcdef\n",
    ):
        assert expected in text


def test_the_page_asks_nothing_of_the_network(tmp_path, write_study):
    page = page_of(write_study(tmp_path, rates=(0.3, 1.0, 3.0), seeds=(0,)))
    reader = PageReader(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        assert name not in FETCHES and not name.startswith("on")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        elif not name.startswith("xmlns"):
            assert "//" not in (value or "")
    policies = [value for name, value in reader.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policies)
    styles = re.findall(r"<style.*?</style>", page, re.S)
    assert styles and not any(re.search(r"@import|https?:|url\((?!#)", style) for style in styles)


def test_ids_are_unique_and_references_lead_somewhere(tmp_path, write_study):
    page = page_of(write_study(tmp_path, rates=(0.3, 1.0, 3.0), seeds=(0,)))
    attributes = PageReader(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in attributes if name in ("href", "xlink:href")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets and targets <= set(ids)


HOSTILE = "<script>alert(1)<|script>\"'&$\\frac{--><img src=x onerror=1>"


def test_hostile_names_are_shown_not_obeyed(tmp_path, write_run):
    workdir = tmp_path / "<b>dir&"
    closing = f"</pre></dd></text>{HOSTILE}"  # a folder's name cannot hold a slash, a setting can
    settings = {"method.targets": closing, "model.name": closing, "data.path": closing}
    for rate in (1e-3, 1e-2):
        tuned = {**settings, "optimizer.lr": rate}
        write_run(workdir, f"{HOSTILE}{rate}", settings=tuned, stopped=HOSTILE)
    hostile_method = {"method.name": HOSTILE}
    write_run(workdir, "other", settings=hostile_method, card={"commit": HOSTILE})
    write_run(workdir, f"{HOSTILE} going", finished=False, settings=settings)
    reader = PageReader(page_of(workdir))
    assert not {"script", "img", "b>dir&"} & set(reader.tags)
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    text = "".join(reader.text)
    assert "<b>dir&" in text and text.count(HOSTILE) > 10


def test_figures_take_the_ink_of_the_page(tmp_path, write_study):
    summary = summarise(
        read_runs(write_study(tmp_path, rates=(0.3, 1.0, 3.0), seeds=(0, 1))), num_resamples=50
    )
    drawings = draw_figures(summary)
    assert [drawing.name for drawing in drawings] == ["results", "ranks", "size", "rates", "curves"]
    for drawing in drawings:
        assert drawing.svg.startswith("<svg ") and drawing.svg.rstrip().endswith("</svg>")
        assert "currentColor" in drawing.svg and "viewBox" in drawing.svg
        colours = {c.lower() for c in re.findall(r"(?:fill|stroke): (#\w+)", drawing.svg)}
        assert not colours & {"#000000", "#ffffff", "#010203"}
        assert "<metadata" not in drawing.svg and "<?xml" not in drawing.svg
    labels = PageReader(drawings[0].svg).text
    assert all(row.label in labels for row in summary.rows)
    assert {"accuracy (%)", "cross-entropy (nats)"} <= set(labels)
    assert draw_figures(summary) == drawings  # nothing random, no date
    paths = write_figures(summary, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{drawing.name}.svg" for drawing in drawings]
    for path, drawing in zip(paths, drawings, strict=True):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert path.read_text(encoding="utf-8") == drawing.svg


def test_a_page_is_made_of_whatever_there_is(tmp_path, write_run):
    write_run(tmp_path, "going", finished=False)
    (tmp_path / "cells" / "new").mkdir()
    text = " ".join(PageReader(page_of(tmp_path)).text)
    assert "No run has finished yet; 2 under way" in text
    assert "unfinished, at step 100" in text and "unfinished, no step yet" in text
    nan = float("nan")
    write_run(tmp_path, "diverged", loss=[nan, nan], correct=[True, False], validation_loss=nan)
    text = " ".join(PageReader(page_of(tmp_path)).text)
    assert "diverged" in text and "50.0" in text


def test_an_unfinished_run_with_another_kind_of_config_is_drawn_by_its_name(tmp_path, write_run):
    cell = write_run(tmp_path, "odd", finished=False)
    (cell / "config.json").write_text('{"method": 3}')
    assert "odd (unfinished)" in to_page(summarise(read_runs(tmp_path)), tmp_path)


def test_the_headline_speaks_of_the_adapter_best_on_validation(tmp_path, write_run):
    few, many = [True, False, False, False], [True, True, True, False]
    write_run(tmp_path, "r1", settings={"method.rank": 1}, validation_loss=0.4, correct=few)
    write_run(tmp_path, "r8", validation_loss=0.5, correct=many)
    write_run(tmp_path, "full", settings={"method.name": "full"}, validation_loss=0.3, correct=many)
    _, sentence = headline(summarise(read_runs(tmp_path), num_resamples=50))
    assert sentence.startswith("LoRA q,v r=1, the adapter with the best validation loss")
    assert "(0.02% of what full fine-tuning trains)" in sentence
    assert "25.0% test accuracy" in sentence and "50.0 points below full fine-tuning" in sentence


def test_the_page_goes_where_it_is_asked_to(tmp_path, write_run):
    write_run(tmp_path / "w", "run")
    assert write_report(tmp_path / "w", tmp_path / "a.html") == tmp_path / "a.html"
    assert write_report(tmp_path / "w", tmp_path / "new") == tmp_path / "new" / "report.html"
    assert (tmp_path / "new" / "table.csv").exists() and (tmp_path / "table.md").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        write_report(tmp_path / "w", tmp_path / "file")
