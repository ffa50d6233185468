"""Screenshots of a report for the README, by a real browser (Debian's chromium and chromium-driver;
pip install selenium).

    python -m experiments.pages.screenshots  # of the demo's interpretations.html
    python -m experiments.pages.screenshots --report path/to/interpretations.html --feature 42 \\
        --out /tmp

Writes report_overview.png, report_index.png, report_feature.png, report_run.png, report_phone.png,
report_phone_feature.png, report_dark.png.
"""

import argparse
import time
from pathlib import Path

from experiments.shared.browser import READY, open_browser, wait
from experiments.shared.provenance import PROJECT, RESULTS


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, default=PROJECT / "interpretations.html")
    parser.add_argument("--feature", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    browser = open_browser()
    try:
        take_all(browser, args.report.resolve().as_uri(), args.feature, args.out)
    finally:
        browser.quit()


def take_all(browser, url, feature, out):
    def take(name, hash, width, height, *, dark=False, phone=False):
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1.5 if phone else 1,
                "mobile": phone,
            },
        )
        browser.get("about:blank")
        browser.get(url + hash)
        wait(browser, READY)
        time.sleep(0.4)
        path = out / f"report_{name}.png"
        browser.save_screenshot(str(path))
        shrink(path)
        print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)")

    browser.get(url)
    wait(browser, READY)
    first = (
        browser.execute_script("return state.shown[2] ?? state.shown[0]")
        if feature is None
        else feature
    )
    take("overview", "", 1360, 860)
    take("index", f"#feature={first}", 1360, 860)
    take("feature", f"#feature={first}", 1360, 1500)
    take("run", "#run", 1360, 860)
    take("dark", "", 1360, 860, dark=True)
    take("phone", "", 400, 800, phone=True)
    take("phone_feature", f"#feature={first}", 400, 800, phone=True)


def shrink(path):
    """Reduce the picture to 128 colours, which a page of text does not need more of."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
