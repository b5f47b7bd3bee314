#!/usr/bin/env python3
"""Uses the page of `fpenet view` in a real browser, headless, as a visitor would: chooses a photo,
drops one, moves the divider, toggles classes, offers a file that is no image, looks at it on a
phone. Checks what the canvases show against the label map that `fpenet segment` writes.

    apt-get install chromium chromium-driver && pip install selenium pillow
    tools/check_view.py [--binary target/release/fpenet] [--shots FOLDER]

Writes screenshots into FOLDER and exits 0 when all is as it should be, 1 otherwise.
"""

import argparse
import base64
import io
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from PIL import Image, ImageStat
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHOTO = ROOT / "assets/example/street.jpg"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/fpenet")
    parser.add_argument("--shots", type=pathlib.Path, default=ROOT / "out/view")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--chromedriver", default=shutil.which("chromedriver"))
    args = parser.parse_args()
    if not (args.chromium and args.chromedriver):
        sys.exit("error: no chromium and chromedriver on the PATH; "
                 "apt-get install chromium chromium-driver")
    args.shots.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        subprocess.run([args.binary, "segment", PHOTO, "--device", "cpu", "--out", folder],
                       check=True, stdout=subprocess.DEVNULL)
        labels = Image.open(folder / "street.labels.png")
        server = subprocess.Popen([args.binary, "view", "--port", "0", "--device", "cpu"],
                                  stdout=subprocess.PIPE, text=True)
        try:
            url = None
            for line in server.stdout:
                if found := re.search(r"http://\S+", line):
                    url = found.group()
                    break
            assert url, "fpenet view printed no address"
            visit(args, url, folder, labels)
        finally:
            server.send_signal(signal.SIGINT)
            rest = server.stdout.read()
            code = server.wait(timeout=10)
        assert (code, rest) == (0, "stopped\n"), f"view ended with {code}, {rest!r}"
    print(f"ok: screenshots in {args.shots}")


def visit(args, url, folder, labels):
    options = webdriver.ChromeOptions()
    options.binary_location = args.chromium
    for flag in FLAGS + [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,800"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=args.chromedriver)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        page = Page(driver, args.shots)
        page.size(1280, 800)
        driver.get(url)
        page.wait(lambda: "11 classes" in page.text("model"))
        page.shot("empty")
        check_photo(page, labels)
        check_divider(page, labels)
        check_classes(page, labels)
        check_opacity(page)
        check_drop(page, folder)
        check_errors(page, folder)
        check_formats(page, folder, labels)
        check_keyboard(page)
        check_phone(page)
        check_console(driver, url)
    finally:
        driver.quit()


class Page:
    def __init__(self, driver, shots):
        self.driver, self.shots = driver, shots

    def size(self, width, height, mobile=False):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1,
            "mobile": mobile})

    def scheme(self, value):
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def one(self, id):
        return self.driver.find_element(By.ID, id)

    def text(self, id):
        return self.one(id).text

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def wait(self, condition, seconds=60):
        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: condition())

    def shot(self, name):
        time.sleep(0.15)  # one frame more than it takes to paint
        png = self.driver.get_screenshot_as_png()
        (self.shots / f"{name}.png").write_bytes(png)
        return Image.open(io.BytesIO(png)).convert("RGB")

    def choose(self, path):
        self.one("file").send_keys(str(path))

    def drop(self, path):
        """Drags a file over the page, with the events that the browser sends, and lets go."""
        data = base64.b64encode(path.read_bytes()).decode()
        return self.js(
            "const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));"
            "const files = new DataTransfer(); files.items.add(new File([bytes], arguments[1]));"
            "const send = kind => document.getElementById('stage').dispatchEvent(new DragEvent("
            "kind, {dataTransfer: files, bubbles: true, cancelable: true}));"
            "const over = send('dragover'), lit = document.body.classList.contains('dragging');"
            "send('drop'); return [over, lit, document.body.classList.contains('dragging')]",
            data, path.name)

    def slide(self, id, value):
        self.js("const s = arguments[0]; s.value = arguments[1];"
                "s.dispatchEvent(new Event('input', {bubbles: true}))", self.one(id), value)

    def pixels(self, canvas):
        """A canvas's pixels as an RGBA image of the photo's size."""
        data = self.js(
            "const c = document.getElementById(arguments[0]);"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "let s = ''; for (let i = 0; i < d.length; i += 8192)"
            " s += String.fromCharCode(...d.subarray(i, i + 8192));"
            "return [c.width, c.height, btoa(s)]", canvas)
        return Image.frombytes("RGBA", (data[0], data[1]), base64.b64decode(data[2]))

    def stage(self):
        return self.js("const b = document.getElementById('stage').getBoundingClientRect();"
                       "return [b.left, b.top, b.width, b.height]")


def expected_overlay(labels, palette, hidden=()):
    table = [(0, 0, 0, 0) if i in hidden else (*palette[i], 255) if i < len(palette) else (0,) * 4
             for i in range(256)]
    out = Image.new("RGBA", labels.size)
    out.putdata([table[label] for label in labels.tobytes()])
    return out


def mean_colour(picture, box):
    return ImageStat.Stat(picture.crop([round(v) for v in box])).mean


def check_photo(page, labels):
    page.choose(PHOTO)
    page.wait(lambda: page.text("status") == "street.jpg, 960×720")
    page.palette = page.js("return model.palette")
    assert page.pixels("overlay").tobytes() == expected_overlay(labels, page.palette).tobytes(), \
        "the overlay is not the label map of fpenet segment in the palette's colours"
    names = page.js("return model.classes")
    counts = labels.histogram()
    rows = page.one("legend").find_elements(By.TAG_NAME, "li")
    first = max(range(len(names)), key=lambda i: counts[i])
    share = f"{100 * counts[first] / (960 * 720):.1f} %"
    assert rows[0].text.split("\n") == [names[first], share], rows[0].text
    assert len(rows) == len(names)
    timing = page.text("timing")
    for stage in ["upload", "decode", "set-up", "inference", "encode", "display", "total"]:
        assert re.search(rf"{stage}\s+[0-9.]+ ms", timing), f"{stage} is missing from {timing!r}"
    print("timing:", ", ".join(timing.split("\n")))


def check_divider(page, labels):
    """Left of the divider the screen shows the photo, right of it the overlay."""
    photo = Image.open(PHOTO).convert("RGB")
    mask = expected_overlay(labels, page.palette).convert("RGB")
    pictures = {"photo": photo, "overlay": Image.blend(photo, mask, 0.5)}
    left, top, width, height = page.stage()
    scale = 960 / width

    def shown(shot, fraction):
        """Which picture's mean colour a patch of the screen has, at a fraction of the width."""
        x, y, half = fraction * width, 0.75 * height, 12
        box = (x - half, y - half, x + half, y + half)
        mean = mean_colour(shot, [v + o for v, o in zip(box, (left, top, left, top))])
        away = {name: max(abs(a - b) for a, b in
                          zip(mean, mean_colour(picture, [v * scale for v in box])))
                for name, picture in pictures.items()}
        nearest = min(away, key=away.get)
        assert away[nearest] < 4, f"at {fraction}: neither photo nor overlay, {away}"
        return nearest

    for at in (50, 80, 20):
        page.slide("slider", at)
        shot = page.shot(f"divider-{at}")
        found = shown(shot, at / 100 - 0.08), shown(shot, at / 100 + 0.08)
        assert found == ("photo", "overlay"), f"divider at {at} %: {found}"
    # With the mouse: a click on the picture puts the divider there.
    stage = page.one("stage")
    ActionChains(page.driver).move_to_element_with_offset(stage, int(width * 0.15), 0).click() \
        .perform()
    value = float(page.one("slider").get_property("value"))
    assert abs(value - 65) < 1, f"a click at 65 % of the width put the divider to {value}"
    assert re.match(r"x \d+, y \d+: \w+", page.text("readout")), page.text("readout")
    page.slide("slider", 50)


def check_classes(page, labels):
    box = page.driver.find_element(By.CSS_SELECTOR, "#legend input")
    hidden = int(box.get_property("value"))
    box.click()
    assert page.pixels("overlay").tobytes() == \
        expected_overlay(labels, page.palette, {hidden}).tobytes(), "a class does not hide"
    page.shot("class-hidden")
    page.one("none").click()
    assert page.pixels("overlay").getextrema()[3] == (0, 0), "none leaves something painted"
    page.one("all").click()
    assert page.pixels("overlay").getextrema()[3] == (255, 255), "all leaves something hidden"


def check_opacity(page):
    page.slide("opacity", 80)
    assert page.text("opacity-value") == "80 %"
    assert page.js("return getComputedStyle(document.getElementById('overlay')).opacity") == "0.8"
    page.slide("opacity", 50)


def check_drop(page, folder):
    small = folder / "dropped.png"
    Image.open(PHOTO).resize((300, 200)).save(small)
    state = page.drop(small)
    # A page that lets dragover pass would have the browser open the file instead.
    assert state == [False, True, False], f"dragover passed, lit up, still lit: {state}"
    page.wait(lambda: page.text("status") == "dropped.png, 300×200")
    shown = page.pixels("photo").convert("RGB").tobytes()
    assert shown == Image.open(small).tobytes(), "the photo on show is not the dropped one"
    assert page.pixels("overlay").getextrema()[3] == (255, 255), "no overlay of the dropped photo"
    page.choose(PHOTO)
    page.wait(lambda: page.text("status") == "street.jpg, 960×720")


def check_errors(page, folder):
    notes = folder / "notes.jpg"
    notes.write_text("no image")
    page.choose(notes)
    page.wait(lambda: page.one("error").is_displayed())
    assert page.text("error").startswith("notes.jpg: expected a complete image"), \
        page.text("error")
    assert page.text("status") == "street.jpg, 960×720", "the photo before it stays"
    page.shot("error")


def check_formats(page, folder, labels):
    """A browser shows no PNM: the server sends it the photo."""
    small = folder / "small.ppm"
    Image.open(PHOTO).convert("RGB").resize((320, 240)).save(small)
    page.choose(small)
    page.wait(lambda: page.text("status") == "small.ppm, 320×240")
    assert not page.one("error").is_displayed(), "the error stays on show"
    shown = page.pixels("photo").convert("RGB").tobytes()
    assert shown == Image.open(small).tobytes(), "the photo on show is not the file's"
    page.one("example").click()
    page.wait(lambda: page.text("status") == "street.jpg, 960×720")
    assert page.pixels("overlay").tobytes() == expected_overlay(labels, page.palette).tobytes()


def check_keyboard(page):
    """Tab reaches every control in order; arrows move the divider, space toggles a class."""
    page.js("document.getElementById('choose').focus()")
    seen = ["choose"]
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = page.driver.switch_to.active_element
        if active.tag_name == "body":
            break
        seen.append(active.get_attribute("id") or active.get_attribute("type"))
    order = ["choose", "example", "save-labels", "save-overlay", "slider", "all", "none",
             "checkbox", "opacity"]
    assert [name for i, name in enumerate(seen) if name not in seen[:i]] == order, seen
    slider = page.one("slider")
    slider.send_keys(Keys.ARROW_RIGHT * 10)
    assert slider.get_property("value") == "55", slider.get_property("value")
    page.shot("focus")
    box = page.driver.find_element(By.CSS_SELECTOR, "#legend input")
    box.send_keys(Keys.SPACE)
    assert not box.is_selected()
    box.send_keys(Keys.SPACE)
    page.slide("slider", 50)


def check_phone(page):
    page.scheme("dark")
    page.shot("dark")
    page.scheme("light")
    page.size(390, 844, mobile=True)
    page.wait(lambda: page.js("return innerWidth") == 390)
    wide = page.js("return document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} px wide on a phone of 390"
    left, _, width, height = page.stage()
    assert left >= 0 and left + width <= 390 and abs(width / height - 4 / 3) < 0.01
    page.shot("phone")
    page.js("scrollTo(0, document.body.scrollHeight)")
    page.shot("phone-below")


def check_console(driver, url):
    """No script error, no violation of the policy; the one refused photo is logged by Chromium."""
    entries = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    unexpected = [m for m in entries if "422" not in m]
    assert not unexpected, unexpected
    requests = driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(r.startswith((url, "blob:")) for r in requests), requests


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")
