"""Pages opened in headless Chromium, the Debian package; tests that need it are skipped where it is absent."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--virtual-time-budget=8000", "--run-all-compositor-stages-before-draw"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

# Before the page's own scripts: what goes wrong. Behind them: what the page shows, as one object, sent to the frame's
# parent, which writes it into its document.
EARS = """<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message || event.target.outerHTML)), true);
addEventListener("unhandledrejection", (event) => wrong.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => wrong.push(`refused: ${event.blockedURI}`));
for (const level of ["error", "warn"]) console[level] = (...words) => wrong.push(words.join(" "));
</script>"""
SHOWN = """<script>
function plain(value) {
  if (ArrayBuffer.isView(value)) return Array.from(value);
  if (Array.isArray(value)) return value.map(plain);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]));
  return value;
}
function overlaps(plot) {
  const found = [];
  for (const axis of [".xaxislayer-above .xtick text", ".yaxislayer-above .ytick text"]) {
    const boxes = [...plot.querySelectorAll(axis)].map((text) => [text.textContent, text.getBoundingClientRect()]);
    for (let i = 0; i < boxes.length; i++)
      for (let j = 0; j < i; j++) {
        const [a, b] = [boxes[i][1], boxes[j][1]];
        if (a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
          found.push(`${plot.id}: ${boxes[j][0]} over ${boxes[i][0]}`);
      }
  }
  return found;
}
const plots = [...document.querySelectorAll(".plot")];
const traces = (plot) => plot.data.map(({ x, y, z, name, meta }) => plain({ x, y, z, name, meta }));
const shown = () => Object.fromEntries(plots.map((plot) => [plot.id, traces(plot)]));
const first = shown();
for (const input of document.querySelectorAll(".slider input")) {
  input.value = 0;
  input.dispatchEvent(new Event("input"));
}
setTimeout(() => parent.postMessage(JSON.stringify({
  wrong, first, moved: shown(), labels: [...document.querySelectorAll(".slider output")].map((one) => one.textContent),
  resources: performance.getEntriesByType("resource").map((entry) => entry.name),
  width: innerWidth, needed: document.documentElement.scrollWidth, overlapping: plots.flatMap(overlaps),
  drawn: plots.filter((plot) => plot.querySelector(".main-svg")).length, text: document.body.innerText,
  ground: getComputedStyle(document.body).backgroundColor,
}), "*"), 300);
</script>"""
FRAME = """<!doctype html><body style="margin:0"><iframe src="inner.html" width="{width}" height="3000"></iframe>
<pre id="out"></pre>
<script>addEventListener("message", (event) => (document.getElementById("out").textContent = event.data));</script>
</body>"""
OWN_HOSTS = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gvt1|gstatic)\.com/")  # Chromium's clock and updates


def opened(page: Path, folder: Path, width: int, *more: str) -> dict[str, Any]:
    """What the page shows in a window of that width, and the URLs that Chromium asked the network for (`requests`)."""
    folder.mkdir()
    text = page.read_text(encoding="utf-8")
    assert text.count("<head>") == 1 and text.count("</body>") == 1
    inner = text.replace("<style>", f"{EARS}<style>", 1).replace("</body>", f"{SHOWN}</body>")
    (folder / "inner.html").write_text(inner, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    log = folder / "net.json"
    places = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--window-size={max(width, 500)},3000")
    command = [str(CHROMIUM), *FLAGS, *places, *more, "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found.group(1), f"Chromium gave no answer: {done.stderr[-2000:]}"
    shown: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    requested = set(re.findall(r'"url":"(https?:[^"]*)"', log.read_text(encoding="utf-8", errors="replace")))
    return shown | {"requests": sorted(url for url in requested if not OWN_HOSTS.match(url))}
