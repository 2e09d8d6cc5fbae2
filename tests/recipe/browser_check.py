"""Opens reports in a headless Chromium: errors, requests, overflow, and pictures to look at.

    python tests/recipe/browser_check.py REPORT.html ... --out FOLDER

Needs a `chromium` on the PATH (Debian's package), and takes pictures at 360 and 1280 pixels, light
and dark, and the print as PDF. Exits with 1 where something is wrong.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

# What stands beyond the right edge without a scrolling box around it.
OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth;
  const scrolls = e =>
    e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const beyond = [...document.querySelectorAll('body *')].filter(
    e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement));
  return {width, page: document.documentElement.scrollWidth,
          beyond: beyond.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
          letters: Math.min(...[...document.querySelectorAll('svg text')].map(
            e => e.getBoundingClientRect().height).filter(h => h > 0))};
})()"""


class Chromium:
    """A browser that is driven through a pair of pipes (DevTools protocol)."""

    def __init__(self, profile):
        to_browser, self.requests = os.pipe()
        self.answers, from_browser = os.pipe()

        def connect():
            # Copies first: one of the two may be 3 or 4 already.
            ends = os.dup(to_browser), os.dup(from_browser)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [shutil.which("chromium") or "chromium", "--headless", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "--no-sandbox", "--disable-gpu"]
        self.process = subprocess.Popen(
            [*command, "about:blank"],
            close_fds=False,
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.numbers, self.buffer, self.events = count(1), b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session = None

    def _read(self):
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise SystemExit("chromium has ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        number = next(self.numbers)
        request = {"id": number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == number:
                if "error" in message:
                    raise SystemExit(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, url):
        self.events = []
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise SystemExit(f"{url}: {failed}")
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def complaints(self):
        """Errors in the console, and requests beyond the file itself."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(f"a request to {url}")
        return found


def check(browser, report, out):
    """Problems of one report; its pictures go to ``out``."""
    problems = []
    # The last is A4 between margins of a centimetre; the print is light whatever the screen is.
    looks = [(w, "screen", scheme) for w in (360, 1280) for scheme in ("light", "dark")]
    for width, media, scheme in [*looks, (718, "print", "dark")]:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        browser.open(report.resolve().as_uri())
        value = browser.call("Runtime.evaluate", expression=OVERFLOW, returnByValue=True)
        found = value["result"]["value"]
        where = f"{report} at {width} px, {scheme if media == 'screen' else media}"
        problems += [f"{where}: {text}" for text in browser.complaints()]
        if found["page"] > found["width"] or found["beyond"]:
            problems.append(f"{where}: {found['page']} px wide: {found['beyond']}")
        print(f"{where}: {found['page']} px wide, letters from {found['letters']} px")
        shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True)
        name = f"{report.parent.name}-{width}-{scheme if media == 'screen' else media}.png"
        (out / name).write_bytes(base64.b64decode(shot["data"]))
    printed = browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27)
    (out / f"{report.parent.name}.pdf").write_bytes(base64.b64decode(printed["data"]))
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("out/browser"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Chromium(profile)
        try:
            problems = [p for report in args.reports for p in check(browser, report, args.out)]
        finally:
            browser.process.terminate()
            browser.process.wait()
    print(*problems, f"{len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
