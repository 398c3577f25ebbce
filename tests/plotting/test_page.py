"""The report: what is in the page, and the page itself in a headless browser.

Covers tdm_jax.plotting.explorer and tdm_jax.report.
"""

import base64
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tdm_jax import create_model, report
from tdm_jax.analysis import results
from tdm_jax.analysis.candidate import Candidate, make_candidate
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.results import Result
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.plotting import explorer
from tdm_jax.plotting.page import html_table, write_page
from tdm_jax.plotting.patch_maps import SourceMap
from tdm_jax.reduction.token_state import TokenKind
from tests import chromium, commands

EVIL = '</script><img src=x onerror="document.title=1">&{{data}}'
ROWS = [
    Result(method="none", top1_percent=98.0, macs=20_000_000),
    Result(method=EVIL, keep_rate=0.75, top1_percent=97.0, macs=15_000_000),
    Result(method=EVIL, keep_rate=0.5, top1_percent=95.5, macs=10_000_000),
]
SIZES = {"patch_size": 7, "width": 16, "depth": 3, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    plain = create_model("vit", **SIZES, image_size=28, in_channels=1)
    variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    candidates = [Candidate("tiny", "none", None, plain, variables)]
    for rate in (0.75, 0.5):
        model = create_model(
            "vit", "tdm", rate, layers=(1, 2), **SIZES, image_size=28, in_channels=1
        )
        candidates.append(Candidate("tiny", EVIL, rate, model, variables))
    path = tmp_path_factory.mktemp("report") / "report.html"
    evaluation = Evaluation({"name": "digits"})
    write_page(path, candidates, ROWS, evaluation, images=3, title=EVIL, remark=EVIL)
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


@pytest.mark.slow
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


def test_features_are_small_pictures_beside_the_unreduced_ones(document):
    plain, runs = (method["runs"] for method in document["methods"])
    for i, image in enumerate(document["images"]):
        own = plain[0]["images"][i]
        assert own["features"] == image["features"]
        assert own["cosine"] == 1
        for run in runs:
            shown = run["images"][i]
            assert shown["features"] != image["features"]
            assert shown["cosine"] < 1
            data = base64.b64decode(shown["features"].removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(data)) as picture:
                assert (picture.size, picture.mode) == ((4, 4), "RGB")


def test_a_stage_holds_the_source_map():
    assign = np.array([0, 1, 1, -1, 2, 2])
    packed = explorer._stage(
        SourceMap((2, 3), assign, np.array([TokenKind.KEPT, TokenKind.MATCHED, TokenKind.CLUSTER]))
    )
    assert packed["kind"] == "kmmdcc"
    assert packed["tokens"] == 3
    numbers = np.frombuffer(base64.b64decode(packed["token"]), "<i2")
    np.testing.assert_array_equal(numbers, assign)
    colors = np.frombuffer(base64.b64decode(packed["color"]), "<i2")
    assert colors[0] == colors[3] == -1
    assert colors[1] == colors[2] != colors[4] == colors[5]


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
    shown = "document.getElementById('features{}').src"
    assert browser.run(shown.format("")) == browser.run(shown.format("-own"))
    caption = "document.getElementById('features-name').textContent"
    assert browser.run(caption) == "none, cosine 1.000"
    browser.run(
        choose.replace("value = 0", "value = 1") + " m.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run(shown.format("")) != browser.run(shown.format("-own"))
    assert browser.run(caption).startswith(EVIL + " 0.5, cosine 0.")
    assert browser.run("document.getElementById('features').naturalWidth") == 4
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
    assert browser.run("[...document.images].every(image => image.alt)")
    assert "Point at a patch" in browser.run("document.getElementById('patch').textContent")


def test_nothing_is_wider_than_the_page(browser):
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_model_that_all_rows_share_is_the_caption():
    rows = [Result(model="<b>", method="none"), Result(model="<b>", method="tdm")]
    table = html_table(rows)
    assert table.startswith("<caption>&lt;b&gt;</caption>")
    assert "Model" not in table
    rows[1] = Result(model="another", method="tdm")
    assert "<caption>" not in html_table(rows)
    assert "Model" in html_table(rows)


def test_every_control_has_a_name(browser):
    names = browser.run(
        "[...document.querySelectorAll('input, select, [role=application], [tabindex]')].map(e =>"
        " e.labels?.[0]?.textContent || e.labels?.[0]?.querySelector('img')?.alt"
        " || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || '')"
    )
    assert len(names) >= 8
    assert all(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["deit_tiny_patch16_224"], "without weights"),
        (["deit_tiny_patch16_224", "deit_small_patch16_224"], "one model"),
        ([], "got none"),
    ],
)
def test_bad_input(names, message, tmp_path):
    candidates = [make_candidate(name) for name in names]
    with pytest.raises(InputError, match=message):
        write_page(tmp_path / "report.html", candidates, ROWS, Evaluation({"name": "digits"}))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_makes_rows_or_reads_them(tmp_path):
    """With every model compiled once: see test_evaluation."""
    model = create_model("vit", **SIZES, image_size=28, in_channels=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    save_model(tmp_path / "tiny", describe(model), variables)
    arguments = [f"--models={tmp_path / 'tiny'}", "--methods=topk", "--layers=1", "--images=2"]
    arguments += ["--data=digits", "--eval_batch_size=360", "--keep_rates=0.5"]
    commands.run(report, *arguments, f"--output={tmp_path / 'made.html'}")
    page = (tmp_path / "made.html").read_text()
    assert page.count("<svg role=") == 5
    (tmp_path / "rows.json").write_text(results.to_json(ROWS))
    commands.run(
        report, *arguments, f"--rows={tmp_path / 'rows.json'}", f"--output={tmp_path / 'read.html'}"
    )
    page = (tmp_path / "read.html").read_text()
    assert "From rows.json." in page
    assert "95.50" in page
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(InputError, match=r"rows.json: expected a table's JSON"):
        commands.run(report, *arguments, f"--rows={tmp_path / 'rows.json'}")


@pytest.mark.slow
def test_photographs_and_a_model_without_a_head_have_a_page(tmp_path):
    sizes = {**SIZES, "num_classes": 0, "image_size": 28, "in_channels": 1}
    model = create_model("vit", **sizes)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    save_model(tmp_path / "tiny", describe(model), variables)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    arguments = [f"--models={tmp_path / 'tiny'}", "--methods=topk,random", "--layers=1"]
    arguments += ["--data=photos", f"--data_dir={tmp_path / 'photos'}", "--eval_batch_size=8"]
    commands.run(report, *arguments, "--macs_ratio=0.7", f"--output={tmp_path / 'page.html'}")
    page = (tmp_path / "page.html").read_text()
    assert '"says":[]' in page and '"label":null' in page and '"classes":{}' in page
    assert "Dense cosine" in page and "Top-1 (%)" not in page
