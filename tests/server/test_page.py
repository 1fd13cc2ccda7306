"""The page, in a real browser."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import nextblock as nb
from nextblock.decoding.events import Committed
from serving import served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PROMPT = "Q: Leo has 8 bags with 7 coins in each. He loses 13. How many coins does Leo have?\nA:"
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def lm():
    lm = nb.load("tiny-bd")
    assert lm.settings is not None
    # Not by what was kept before: passes are compared with those of another call.
    lm.settings = lm.settings.model_copy(update={"decoding": {**lm.settings.decoding, "draft_length": 12}})
    return lm


@pytest.fixture(scope="module")
def browser(lm):
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1140"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        with served(lm) as (_, url):
            driver.get(url)
            until(driver, lambda: "tiny-bd" in driver.title)
            yield driver
    finally:
        driver.quit()


def until(browser, condition):
    WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())


def by_id(browser, name):
    return browser.find_element(By.ID, name)


def fill(browser, name, text):
    element = by_id(browser, name)
    element.clear()
    element.send_keys(text)


def choose(browser, mode):
    browser.find_element(By.CSS_SELECTOR, f"input[value={mode}]").find_element(By.XPATH, "..").click()


def run(browser):
    """Decode by keyboard; what a screen reader is told at the end."""
    status = by_id(browser, "status")
    by_id(browser, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(browser, lambda: status.get_attribute("textContent").startswith("done"))
    return status.get_attribute("textContent")


def go_to(browser, step):
    browser.execute_script(
        "const s = document.getElementById('scrubber'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
        step,
    )


def cells(browser, mode):
    """What the lane of a mode shows: texts of tokens, None where nothing is decided."""
    script = """return [...document.querySelectorAll(`[data-mode=${arguments[0]}] .token`)].map(
        (cell) => cell.classList.contains("mask") ? null : cell.textContent)"""
    return browser.execute_script(script, mode)


@needs_browser
@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_each_token_stands_in_its_place_from_the_pass_on_that_decides_it(lm, browser, mode):
    fill(browser, "prompt", PROMPT)
    fill(browser, "max_tokens", "60")
    choose(browser, mode)
    told = run(browser)
    stream = lm.stream(PROMPT, mode=mode, max_new_tokens=60)
    events = [event for event in stream if isinstance(event, Committed)]
    row = stream.rows[0]
    assert told == f"done. {mode}: {len(row.answer)} tokens in {row.passes} passes"
    answer = browser.find_element(By.CSS_SELECTOR, f"[data-mode={mode}] .answer").get_attribute("textContent")
    assert answer == lm.generate(PROMPT, mode=mode, max_new_tokens=60).texts[0]
    for step in range(0, row.passes + 1, 1 if mode != "ar" else 9):
        go_to(browser, step)
        decided = {event.offset: event for event in events if event.step <= step and event.offset < len(row.answer)}
        shown = cells(browser, mode)
        assert {n: text for n, text in enumerate(shown) if text is not None} == {
            n: lm.tokenizer.decode([event.token]).replace("\n", "⏎") for n, event in decided.items()
        }
    if mode == "speculative":
        assert browser.execute_script("return lanes[0].events.some((event) => event.type === 'rejected')")


@needs_browser
def test_a_race_runs_all_modes_and_replays_from_the_keyboard(browser):
    fill(browser, "prompt", PROMPT)
    choose(browser, "race")
    told = run(browser)
    assert [told.count(f"{mode}:") for mode in ("diffusion", "speculative", "ar")] == [1, 1, 1]
    for name in ("per-pass", "per-second", "passes", "tokens"):
        assert all(float(found.text) > 0 for found in browser.find_elements(By.CSS_SELECTOR, f".lane .{name}"))
    scrubber = by_id(browser, "scrubber")
    scrubber.send_keys(Keys.HOME)
    assert by_id(browser, "pass").text.startswith("pass 0 of")
    assert cells(browser, "ar") == []
    for _ in range(4):
        scrubber.send_keys(Keys.ARROW_RIGHT)
    assert len(cells(browser, "ar")) == 4
    assert None in cells(browser, "diffusion")
    if wanted := os.environ.get("NEXTBLOCK_SCREENSHOT"):
        browser.execute_script("document.activeElement.blur()")
        time.sleep(0.3)
        browser.save_screenshot(wanted)
    by_id(browser, "play").send_keys(Keys.ENTER)
    until(browser, lambda: len(cells(browser, "ar")) > 8)
    until(browser, lambda: by_id(browser, "play").get_attribute("aria-pressed") == "false")


@needs_browser
def test_what_the_server_refuses_is_shown_and_the_page_goes_on(browser):
    choose(browser, "diffusion")
    browser.execute_script("document.getElementById('prompt').value = 'word '.repeat(3000)")
    by_id(browser, "run").click()
    error = by_id(browser, "error")
    until(browser, error.is_displayed)
    assert "context" in error.text
    assert error.get_attribute("role") == "alert"
    fill(browser, "prompt", PROMPT)
    run(browser)
    assert not error.is_displayed()
    refused = [line for line in browser.get_log("browser") if "status of 400" not in line["message"]]
    assert refused == []  # no script and no style that the page's own policy stops


@needs_browser
def test_the_page_fits_a_phone_in_dark_colours_and_stops_on_request(browser):
    device = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    choose(browser, "ar")
    fill(browser, "max_tokens", "1500")
    fill(browser, "temperature", "2")
    by_id(browser, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(browser, lambda: len(cells(browser, "ar")) > 3)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(browser, by_id(browser, "run").is_enabled)
    assert len(cells(browser, "ar")) < 1500
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(18, 20, 23)"


def test_the_page_loads_nothing_from_outside(lm):
    with served(lm) as (_, url):
        for name in ("", "page.css", "page.js"):
            response = httpx.get(f"{url}/{name}")
            assert response.status_code == 200
            assert "default-src 'none'" in response.headers["content-security-policy"]
            links = response.text.replace("http://www.w3.org/2000/svg", "")
            assert "//" not in links.replace("// ", "") or "http" not in links
        assert {path.name for path in (Path(nb.__file__).parent / "server" / "page").iterdir()} == {
            "index.html",
            "page.css",
            "page.js",
        }
