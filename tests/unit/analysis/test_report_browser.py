"""The report in a real browser, without a network: all of it is drawn, on a desktop and on a phone, light and dark."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report_cases

import kvtrace

CHROMIUM = report_cases.CHROMIUM
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(report_cases.BROWSERS)} is on the path"
)

HEIGHT = 16_000  # all of a page, so that nothing need be scrolled to
# Runs in a copy of the page and tells the window around it what became of it. The narrowest window of a browser is
# wider than a phone, so the page lies in a frame.
PROBE = """<script>
const SAID = [];
addEventListener("error", (event) => SAID.push(event.message));
addEventListener("securitypolicyviolation", (event) => SAID.push(event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...words) => SAID.push(words.join(" "));
const after = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
addEventListener("load", async () => {
  await after(2000);
  const charts = [...document.querySelectorAll(".chart")];
  const wider = (chart) => chart.querySelector(".main-svg")?.clientWidth > chart.clientWidth + 1;
  const spilt = charts.filter(wider).length;
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  await after(500);
  parent.postMessage({
    width: innerWidth, spilt, wide: document.documentElement.scrollWidth, said: SAID, charts: charts.length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, sections: document.querySelectorAll("section").length,
    undrawn: charts.filter((chart) => !chart.querySelector(".main-svg")).map((chart) => chart.ariaLabel),
    tables: document.querySelectorAll("details table tbody tr").length,
    ink: getComputedStyle(document.body).color,
    reachable: document.querySelectorAll("nav a, summary, details .scroll[tabindex]").length,
  }, "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body style="margin:0"><script>
addEventListener("message", (event) => {{
  const told = document.createElement("pre");
  told.textContent = JSON.stringify(event.data);
  document.body.append(told);
}});
</script><iframe src="page.html" style="width:{width}px;height:{HEIGHT}px;border:0"></iframe></body>"""


def looked_at(page: Path, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What a browser makes of the page in a frame of that width."""
    assert CHROMIUM is not None
    text = page.read_text("utf-8").replace("<style>", PROBE + "<style>", 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width, HEIGHT=HEIGHT))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size=1400,{HEIGHT}",
         f"--user-data-dir={folder / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, f"the page said nothing\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("thrash", 1280, False), ("thrash", 390, True), ("no-steps", 390, False)]
)
def test_every_chart_is_drawn(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    trace = report_cases.case(name, tmp_path)
    page = tmp_path / "report.html"
    rows = kvtrace.report(trace, page)
    folder = tmp_path / "seen"
    folder.mkdir()
    told = looked_at(page, folder, width, dark)
    assert told["said"] == []
    assert told["undrawn"] == []
    assert told["charts"] == page.read_text("utf-8").count('class="chart"') > 0
    assert told["sections"] == rows["section"].n_unique()
    assert told["width"] == width
    assert told["wide"] <= width  # nothing to scroll to the side
    assert told["spilt"] == 0
    assert told["dark"] is dark
    assert told["tables"] > told["charts"]  # opened, they have rows
    assert told["reachable"] == told["sections"] + 2 * told["charts"]
    light = sum(map(int, re.findall(r"\d+", told["ink"])[:3])) > 3 * 128
    assert light is dark  # the letters
