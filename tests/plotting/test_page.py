"""The report: what is in the page, and the page itself in a headless browser."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, data, report
from tdm_jax.analysis.candidate import Candidate, contender
from tdm_jax.errors import InputError
from tdm_jax.plotting.patch_maps import SourceMap
from tdm_jax.reduction.token_state import TokenKind
from tests import chromium

EVIL = '</script><img src=x onerror="document.title=1">&{{data}}'
SOURCE = data.make_config(name="digits")
RECORDS = [
    {"method": "none", "keep_rate": None, "top1_percent": 98.0, "macs": 2e7},
    {"method": EVIL, "keep_rate": 0.75, "top1_percent": 97.0, "macs": 15e6},
    {"method": EVIL, "keep_rate": 0.5, "top1_percent": 95.5, "macs": 1e7},
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sizes = {"patch_size": 7, "width": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
    plain = create_model("vit", **sizes, image_size=28, in_channels=1)
    params = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    entries = [Candidate("tiny", "none", None, plain, params)]
    for rate in (0.75, 0.5):
        model = create_model(
            "vit", "tdm", rate, layers=(1, 2), **sizes, image_size=28, in_channels=1
        )
        entries.append(Candidate("tiny", EVIL, rate, model, params))
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(path, entries, RECORDS, SOURCE, images=3, title=EVIL, remark=EVIL)
    return path


@pytest.fixture(scope="module")
def document(page):
    text = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1]
    return json.loads(text)


@pytest.fixture(
    scope="module", params=[(1280, 900, False), (390, 844, True)], ids=["desk", "phone"]
)
def browser(request, page):
    program = chromium.find()
    if program is None:
        pytest.skip("DID NOT RUN: no chromium, chromium-browser or google-chrome was found")
    browser = chromium.Chromium(program, *request.param)
    browser.open(page.as_uri())
    yield browser
    browser.close()


def test_the_explorer_has_every_image_method_rate_and_stage(document):
    assert document["grid"] == [4, 4]
    assert len(document["images"]) == 3
    assert [method["name"] for method in document["methods"]] == ["none", EVIL]
    runs = document["methods"][1]["runs"]
    assert [run["rate"] for run in runs] == ["0.75", "0.5"]
    for run in runs:
        assert run["stages"] == [2, 3]
        for image in run["images"]:
            assert [len(stage["kind"]) for stage in image["stages"]] == [16, 16]
            shares = [share for _, share in image["says"]]
            assert shares == sorted(shares, reverse=True)
    assert [stage["tokens"] for stage in runs[1]["images"][0]["stages"]] == [8, 4]


def test_a_stage_holds_the_source_map():
    assign = np.array([0, 1, 1, -1, 2, 2])
    packed = report._stage(
        SourceMap((2, 3), assign, np.array([TokenKind.KEPT, TokenKind.MATCHED, TokenKind.CLUSTER]))
    )
    assert packed["kind"] == "kmmdcc"
    assert packed["tokens"] == 3
    numbers = np.frombuffer(report.base64.b64decode(packed["token"]), "<i2")
    np.testing.assert_array_equal(numbers, assign)
    colours = np.frombuffer(report.base64.b64decode(packed["colour"]), "<i2")
    assert colours[0] == colours[3] == -1
    assert colours[1] == colours[2] != colours[4] == colours[5]


def test_the_page_refers_to_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    outside = [url for url in re.findall(r'(?:src|href|url)\s*[=(:]\s*["\']?([^"\')\s>]+)', text)
               if not url.startswith(("data:", "#", "image.url", "{"))]  # fmt: skip
    assert not [url for url in outside if "//" in url]


def test_it_opens_without_a_complaint_or_a_request(browser, page):
    assert browser.complaints() == []
    assert {url for url in browser.requests() if not url.startswith("data:")} == {page.as_uri()}
    assert browser.run("document.title") == EVIL
    assert browser.run("document.querySelectorAll('td').length") > 0
    assert browser.run("document.querySelectorAll('figure svg[role=img]').length") == 2
    # Nothing is wider than the screen.
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_controls_change_picture_and_words(browser):
    summary = "document.getElementById('summary').textContent"
    shapes = "document.querySelectorAll('#picture path').length"
    assert browser.run("document.getElementById('method').selectedOptions[0].text") == EVIL
    assert "9 tokens of 16 patches" in browser.run(summary)
    before = browser.run(summary)
    browser.run("document.querySelectorAll('#stages input')[1].click()")
    assert browser.run(summary) != before
    assert "12 tokens of 16 patches" in browser.run(summary)
    slide = "(() => { const s = document.getElementById('rate'); s.value = 0;"
    browser.run(slide + " s.dispatchEvent(new Event('input')); })()")
    assert "8 tokens of 16 patches" in browser.run(summary)
    assert browser.run("document.getElementById('rate-value').textContent") == "0.5"
    assert browser.run("document.getElementById('rate').getAttribute('aria-valuetext')") == "0.5"
    assert browser.run(shapes) > 2
    browser.run("document.querySelectorAll('#stages input')[0].click()")
    assert "All 16 patches" in browser.run(summary)
    assert browser.run(shapes) == 0
    choose = "(() => { const m = document.getElementById('method'); m.value = 0;"
    browser.run(choose + " m.dispatchEvent(new Event('change')); })()")
    assert browser.run("document.querySelectorAll('#stages input').length") == 1
    url = "document.querySelector('#picture image').getAttribute('href')"
    first = browser.run(url)
    browser.run("document.querySelectorAll('#images input')[2].click()")
    assert browser.run(url) != first
    assert browser.complaints() == []


def test_it_works_by_keyboard(browser):
    browser.run("document.getElementById('method').value = 1")
    browser.run("document.getElementById('method').dispatchEvent(new Event('change'))")
    browser.run("document.querySelectorAll('#stages input')[0].focus()")
    browser.press("ArrowRight")
    # The choice moved, and the focus stayed in the group that was drawn anew.
    assert browser.run("document.activeElement.name") == "stages"
    assert browser.run("document.activeElement.checked && document.activeElement.value") == "1"
    browser.run("document.getElementById('picture').focus()")
    for _ in range(3):
        browser.press("ArrowLeft")
    assert "Row 3, column 1:" in browser.run("document.getElementById('patch').textContent")
    browser.press("ArrowUp")
    assert "Row 2, column 1:" in browser.run("document.getElementById('patch').textContent")
    browser.press("Escape")
    assert "Point at a patch" in browser.run("document.getElementById('patch').textContent")


def test_nothing_is_wider_than_the_page(browser):
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_model_that_all_rows_share_is_the_caption():
    rows = [{"model": "<b>", "method": "none"}, {"model": "<b>", "method": "tdm"}]
    table = report.html_table(rows)
    assert table.startswith("<caption>&lt;b&gt;</caption>")
    assert "Model" not in table
    rows[1]["model"] = "another"
    assert "<caption>" not in report.html_table(rows)
    assert "Model" in report.html_table(rows)


def test_every_control_has_a_name(browser):
    names = browser.run(
        "[...document.querySelectorAll('input, select, [role=application], [tabindex]')].map(e =>"
        " e.labels?.[0]?.textContent || e.labels?.[0]?.querySelector('img')?.alt"
        " || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || '')"
    )
    assert len(names) >= 8
    assert all(names)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["deit_tiny_patch16_224"], "without weights"),
        (["deit_tiny_patch16_224", "deit_small_patch16_224"], "one model"),
        ([], "got none"),
    ],
)
def test_bad_input(entries, message, tmp_path):
    with pytest.raises(InputError, match=message):
        report.write_report(
            tmp_path / "report.html", [contender(name) for name in entries], RECORDS, SOURCE
        )
    assert not list(tmp_path.iterdir())
