"""A real browser for pages of this project: Debian's chromium and chromium-driver, and selenium."""

from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
READY = "return document.body?.dataset.ready"  # of a report that shows what it unpacks


def open_browser() -> Any:
    """Debian's chromium without a window, under selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")
    )


def wait(browser: Any, script: str) -> None:
    """Wait until `script` returns something true, a minute at most."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.02).until(lambda b: b.execute_script(script))
