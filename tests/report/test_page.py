"""The page in a real browser."""

import json
import re
import shutil
import subprocess

import pytest

from lora_ggpo.report.comparison import write_report
from lora_ggpo.report.study import write_study_report
from tests.report.grids import write_full_grid, write_study

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on PATH")

# Acts on the first table as a reader would, and leaves what it then shows in the page's title.
PROBE = """
<script>
const table = document.querySelector("table"), seen = {};
const rows = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const sorted = () => [...table.querySelectorAll("th")].map((head) => head.getAttribute("aria-sort"));
const button = (column) => table.querySelectorAll("th button")[column];
seen.before = rows();
button(2).click(); seen.up = rows(); seen.upSort = sorted();
button(2).click(); seen.down = rows(); seen.downSort = sorted();
button(0).click(); seen.words = rows(); seen.wordsSort = sorted();
button(0).focus(); seen.focus = document.activeElement === button(0);
seen.pageWidth = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.figures = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height > 100);
seen.background = getComputedStyle(document.body).backgroundColor;
document.title = JSON.stringify(seen);
</script>
</body>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_full_grid(tmp_path_factory.mktemp("page"))
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def study_page(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"), ranks=(1, 4, 16, 64), seeds=3)
    write_study_report(folder)
    return folder / "report.html"


def _browse(page, tmp_path, *flags):
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, (
        done.stderr
    )  # where the browser puts errors of scripts and of the page's policy
    return done.stdout


def _probe(page, tmp_path, *flags):
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text().replace("</body>", PROBE))
    title = re.search(r"<title>(.*?)</title>", _browse(copy, tmp_path, "--dump-dom", *flags), re.S)
    return json.loads(title[1])


def test_a_click_on_a_header_sorts(page, tmp_path):
    seen = _probe(page, tmp_path)
    assert seen["before"] == ["LoRA", "DoRA", "SAM", "GGPO (relative rule)"]
    # The baseline has no difference: it stays at the end both ways.
    assert seen["up"] == ["SAM", "GGPO (relative rule)", "DoRA", "LoRA"]
    assert seen["down"] == ["DoRA", "GGPO (relative rule)", "SAM", "LoRA"]
    assert seen["words"] == ["DoRA", "GGPO (relative rule)", "LoRA", "SAM"]
    assert (seen["upSort"][2], seen["downSort"][2]) == ("ascending", "descending")
    assert seen["wordsSort"] == ["ascending"] + [None] * 6
    assert seen["focus"]


@pytest.mark.parametrize("width", [500, 1280])  # a window cannot be narrower
@pytest.mark.parametrize(("made", "figures"), [("page", 3), ("study_page", 5)])
def test_nothing_but_tables_and_figures_scrolls_sideways(request, tmp_path, made, figures, width):
    seen = _probe(request.getfixturevalue(made), tmp_path, f"--window-size={width},900")
    assert seen["pageWidth"] == 0
    assert seen["figures"] == [True] * figures


def test_dark_and_light(page, tmp_path):
    colours = [
        _probe(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")["background"] for scheme in (0, 1)
    ]
    assert colours == ["rgb(22, 25, 29)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize("made", ["page", "study_page"])
def test_it_is_drawn(request, tmp_path, made):
    image = tmp_path / "page.png"
    _browse(request.getfixturevalue(made), tmp_path, "--window-size=1280,2000", f"--screenshot={image}")
    assert image.stat().st_size > 50_000
