"""The dashboard in a real browser, without a screen and without a network. Skipped where no Chromium is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .harness import WAIT_S, Running, serving, until
from .test_faults import connected, send_long, slowed

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr",
    "--window-size=1200,900",
    "--virtual-time-budget=4000",
)
BACKGROUND = {"light": (0xF6, 0xF7, 0xF9), "dark": (0x0F, 0x13, 0x19)}

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}; apt-get install chromium")
    return found


def browse(browser: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints  # scripts that fail, and whatever the page was not allowed to load
    return done


def text_of(html: str) -> str:
    """What a page says, without its scripts and its tags."""
    return " ".join(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def test_the_page_shows_the_slots_as_they_are(browser: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_model_folder, prefix_caching=False) as running:
        running.post("completions")
        html = page_of_two_streams(browser, running, tmp_path)
    text = text_of(html)
    assert " tiny ready " in text
    assert "unreachable" not in text
    assert html.count('class="slot"') == 2
    assert "2 cold slots: addresses only" in text
    assert text.count(" active ") == 2
    assert re.search(r"\d+ tokens, [\d.]+ (B|KiB) of [\d.]+ KiB", text)
    assert "2 of 4 sequences running" in text
    assert re.search(r"\d+ pages of [\d.]+ KiB owned", text)
    assert html.count("<svg") == 5
    assert len(re.findall(r'<path d="M', html)) >= 5  # every chart has drawn something, but for times to first token


def page_of_two_streams(browser: str, running: Running, tmp_path: Path) -> str:
    """The dashboard, as a browser shows it while two requests run."""
    with slowed(running) as steps, connected(running) as one, connected(running) as two:
        send_long(one, "chat")
        send_long(two, "completions", stream=True)
        until(lambda: running.service.engine.health().n_open == 2)
        steps.release(6)
        until(lambda: len(running.engine.memory.cache.active_slots()) == 2)
        return browse(browser, tmp_path, "--dump-dom", f"{running.url}/dashboard").stdout


def test_the_page_says_when_it_reaches_nobody(browser: str, running: Running, tmp_path: Path) -> None:
    page = running.client.get("/dashboard").text
    (tmp_path / "page.html").write_text(page)
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert "unreachable" in text_of(done.stdout)
    assert "CONSOLE" in done.stderr  # which the other tests would see


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_in_light_and_in_dark(browser: str, running: Running, tmp_path: Path, scheme: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    running.post("completions")
    picture = tmp_path / "dashboard.png"
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    browse(browser, tmp_path, *flags, f"--screenshot={picture}", f"{running.url}/dashboard")
    pixels = (image.imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape == (900, 1200, 3)
    assert tuple(pixels[2, 2]) == BACKGROUND[scheme]
    colours = {tuple(pixel) for row in pixels[::7, ::7] for pixel in row}
    assert len(colours) > 20  # cards, bars and text
