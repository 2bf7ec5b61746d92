"""The page in a real browser: what a visitor does, from the upload to the downloaded volume, on a desk and on a phone.

Needs Debian's `chromium` and `chromium-driver` (or whatever selenium finds). Screenshots go to `$CI_ARTIFACTS`, or to
`screenshots/` of the temporary folder.
"""

import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from gradio_client import Client, handle_file
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from synermedgen_hf import read_volume

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")
PATIENCE = 90  # seconds
QUICK = {"target": "CT", "source": "MRI", "region": "brain", "steps": 1, "api_name": "/synthesize"}


class Page:
    def __init__(self, driver, address, downloads, pictures):
        self.driver, self.address, self.downloads, self.pictures = driver, address, downloads, pictures
        driver.get(address)
        self.wait(lambda: self.all("#examples button img"))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.wait(lambda: self.all(selector))[0]

    def wait(self, condition, what="it"):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except Exception as error:  # the page redraws elements while one looks at them
                what = f"{what} ({type(error).__name__})"
            time.sleep(0.2)
        self.shoot("timeout")
        raise AssertionError(f"Waited {PATIENCE} s for {what[:200]}.")

    def click(self, selector):
        element = self.one(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(0.2)
        element.click()

    def text(self, selector):
        return self.one(selector).text

    def upload(self, selector, path):
        self.one(f"{selector} input[type=file]").send_keys(str(path))

    def fill(self, selector, value):
        """A number beside a slider."""
        field = self.one(f"{selector} input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def pick(self, selector, label):
        """One of several round buttons."""
        named = f"{selector} label"
        found = self.wait(lambda: [one for one in self.all(named) if one.text.strip() == label], label)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def synthesize(self, source, steps, samples):
        """The first target of an upload that is a `source`, with settings of one's own."""
        self.wait(lambda: "×" in self.text(".seen"), "the scan to be read")
        self.choose("#source", source)
        self.wait(lambda: self.all("#targets input[type=checkbox]"), "targets")
        self.click("#advanced button.label-wrap")
        self.fill("#steps", steps)
        self.fill("#samples", samples)
        self.click("#start")

    def choose(self, selector, label):
        """An entry of a drop-down."""
        field = self.one(f"{selector} input")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.click()
        self.wait(lambda: [one for one in self.all("ul[role=listbox] li") if one.text.strip("✓ \n") == label])[
            0
        ].click()

    def offered(self, ending):
        """Links to files of this name."""
        return [link for link in self.all("#files a") if (link.get_attribute("href") or "").endswith(ending)]

    def press(self, *keys):
        """Keys, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector):
        """Onwards with the tabulator until the focus lies there, and can be seen to."""
        focused = "return Boolean(document.activeElement.closest(arguments[0]))"
        for _ in range(60):
            self.press(Keys.TAB)
            if self.driver.execute_script(focused, selector):
                return
        raise AssertionError(f"The tabulator does not lead to {selector}.")

    def shoot(self, name):
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("CI_ARTIFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(space, tmp_path, pictures):
    """Opens the page in a window of some size."""
    drivers = []

    def open_page(width=1440, height=1000, path=""):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        drivers.append(webdriver.Chrome(options=options, service=Service(DRIVER)))
        if width < 500:  # Chromium's own windows are no narrower
            phone = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            drivers[-1].execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        return Page(drivers[-1], space["address"] + path, tmp_path / "downloads", pictures)

    yield open_page
    for driver in drivers:
        driver.quit()


def model_is_free(space, scan):
    """One request after the other: whoever comes now would wait for work that goes on."""
    begin = time.monotonic()
    Client(space["address"], verbose=False, download_files=False).predict(scan=handle_file(scan), **QUICK)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("width, height", [(1440, 1000), (390, 844)], ids=["desk", "phone"])
def test_from_the_upload_to_the_volume(visit, scan, width, height):
    page = visit(width, height)
    page.upload("#scan", scan)
    page.wait(lambda: "40 × 48 × 5" in page.text(".seen"), "the scan to be read")
    page.choose("#source", "MRI")
    page.wait(lambda: page.all("#targets input[type=checkbox]"), "targets")
    labels = [label.text for label in page.all("#targets label")]
    assert "CT" in labels and "PET" not in labels  # what these weights were trained for
    assert page.one("#targets input").is_selected()
    page.click("#start")
    page.wait(lambda: "Done" in page.text("#progress"), "the synthesis")
    page.wait(lambda: page.all("#pictures img"), "the pictures")
    page.shoot(f"upload-{width}")
    assert "Synthetic CT" in page.text("#values") and "HU" in page.text("#values")

    # Scrub: other values, and another picture.
    before, shown = page.text("#values"), page.one("#pictures img").get_attribute("src")
    slider = page.one("#slice input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.text("#values") != before, "the values of another slice")
    page.wait(lambda: page.one("#pictures img").get_attribute("src") != shown, "the picture of another slice")
    assert page.one("#pictures img").get_attribute("src").endswith(".png")

    # Take it away: the file that the page offers, by the address the browser would fetch.
    link = page.wait(lambda: page.offered(".nii.gz"))[0]
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    page.wait(lambda: list(page.downloads.glob("*.nii.gz")), "the download")
    made, given = nibabel.load(next(page.downloads.glob("*.nii.gz"))), nibabel.load(scan)
    assert made.shape == given.shape and np.allclose(made.affine, given.affine)
    assert made.get_fdata().min() == -1024 and made.get_fdata()[20, 24, 2] > -1024
    severe = [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in severe if "favicon" not in entry["message"]]


def test_several_targets_at_once_and_the_values_under_the_pointer(visit, scan):
    page = visit()
    page.upload("#scan", scan)
    page.wait(lambda: "×" in page.text(".seen"), "the scan to be read")
    page.choose("#source", "T1-weighted MRI")
    page.wait(lambda: len(page.all("#targets label")) == 3, "three targets")
    wanted = [label.text for label in page.all("#targets label")][:2]
    for place in (1, 2):
        if not page.one(f"#targets label:nth-of-type({place}) input").is_selected():
            page.click(f"#targets label:nth-of-type({place})")
    page.click("#advanced button.label-wrap")
    page.fill("#steps", 1)
    page.click("#start")
    page.wait(lambda: "Done" in page.text("#progress"), "both syntheses")
    assert [label.text for label in page.all("#shown label")] == wanted
    before = page.text("#values")
    page.pick("#shown", wanted[1])
    page.wait(lambda: page.text("#values") != before, "the values of the second")

    def point_at(share):
        picture = page.one("#pictures img")
        aside = int((share - 0.5) * picture.size["width"])
        ActionChains(page.driver).move_to_element_with_offset(picture, aside, 0).perform()

    places = set()
    for share in (0.3, 0.4):
        point_at(share)
        places.add(page.wait(lambda: re.search(r"row \d+, column \d+", page.text("#values")), "a place").group())
        time.sleep(1)
        places.add(re.search(r"row \d+, column \d+", page.text("#values")).group())
    assert len(places) > 1
    page.shoot("two-targets")


def test_the_spread_of_seeds_and_a_derived_series(visit, series, tmp_path):
    page = visit()
    page.upload("#scan", series)
    page.wait(lambda: "DICOM" in page.text(".seen"), "the series to be read")
    page.synthesize("MRI", steps=1, samples=2)
    page.wait(lambda: "Done" in page.text("#progress"), "the synthesis")
    page.pick("#view", "Spread over seeds")
    page.wait(lambda: "Spread over seeds" in page.text("#values"), "the spread")
    page.shoot("spread")

    page.pick("#form", "Derived DICOM")
    link = page.wait(lambda: page.offered(".zip"))[0]
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    page.wait(lambda: list(page.downloads.glob("*.zip")), "the download")
    with zipfile.ZipFile(next(page.downloads.glob("*.zip"))) as archive:
        archive.extractall(tmp_path / "made")
    files = sorted(path for path in (tmp_path / "made").rglob("*") if path.is_file())
    headers = [pydicom.dcmread(path) for path in files]
    assert len(headers) == 4 and all("DERIVED" in header.ImageType for header in headers)
    assert not any("Doe" in str(header) or "4711" in str(header) for header in headers)
    made, given = read_volume(files[0].parent), read_volume(tmp_path / "series")
    assert made.array.shape == given.array.shape and np.allclose(made.affine, given.affine)


def test_a_closed_tab_stops_the_work(visit, scan, space):
    page = visit()
    page.upload("#scan", scan)
    page.synthesize("MRI", steps=100, samples=8)
    page.wait(lambda: "slice" in page.text("#progress"), "the synthesis to begin")
    page.driver.close()
    model_is_free(space, scan)


def test_cancelling_stops_the_work(visit, scan, space):
    page = visit()
    page.upload("#scan", scan)
    page.synthesize("MRI", steps=100, samples=8)
    page.wait(lambda: "slice" in page.text("#progress"), "the synthesis to begin")
    page.click("#cancel")
    page.wait(lambda: page.text("#progress") == "Cancelled.", "the word that it is cancelled")
    model_is_free(space, scan)
    assert page.text("#progress") == "Cancelled." and not page.all("#pictures img")


def test_another_target_chosen_during_a_run_is_for_the_next_one(visit, scan):
    page = visit()
    page.upload("#scan", scan)
    page.synthesize("T1-weighted MRI", steps=40, samples=2)
    page.wait(lambda: "slice" in page.text("#progress"), "the synthesis to begin")
    first, second = page.all("#targets input[type=checkbox]")[:2]
    first.click()
    second.click()
    assert "slice" in page.text("#progress")  # while it runs
    page.wait(lambda: "Done" in page.text("#progress"), "the synthesis")
    page.wait(lambda: "Synthetic T1CE" in page.text("#values"), "what was asked for first")
    page.fill("#steps", 1)
    page.click("#start")
    page.wait(lambda: "Synthetic T2" in page.text("#values"), "what was asked for then")


def test_the_handle_of_the_pictures_moves(visit):
    page = visit()
    page.click("#examples button")
    page.wait(lambda: page.all("#targets input[type=checkbox]"), "targets")
    page.click("#start")
    seen = (
        "const pictures = [...document.querySelectorAll('#pictures img')];"
        "return pictures.length == 2 && pictures.every((one) => one.complete && one.naturalWidth > 0)"
    )
    page.wait(lambda: page.driver.execute_script(seen), "the pictures, and not only their places")

    def hidden():
        """The share of the right picture that lies under the left one."""
        style = page.all("#pictures img")[1].get_attribute("style")
        return float(re.search(r"inset\(.* ([\d.]+)%\)", style)[1])

    middle = page.wait(hidden)
    handle = page.one("#pictures [data-testid=slider] .inner")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    for way in (-1, 1):
        ActionChains(page.driver).drag_and_drop_by_offset(handle, way * 150, 0).perform()
        page.wait(lambda way=way: (hidden() - middle) * way > 5, "the handle to follow")
        page.shoot(f"handle{way:+d}")
        ActionChains(page.driver).drag_and_drop_by_offset(handle, -way * 150, 0).perform()


def test_everything_by_the_keyboard(visit):
    page = visit()
    page.tab_to("#examples button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.all("#targets input[type=checkbox]"), "targets")
    page.tab_to("#targets input")
    page.tab_to("#start")
    outline = "const style = getComputedStyle(document.activeElement); return style.outlineStyle"
    assert page.driver.execute_script(outline) == "solid"  # where one is can be seen
    page.press(Keys.ENTER)
    page.wait(lambda: "Synthetic CT" in page.text("#values"), "the synthesis")
    before = page.text("#values")
    page.tab_to("#slice input[type=range]")
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.text("#values") != before, "the values of another slice")
    page.tab_to("#form label:nth-of-type(2)")
    page.press(Keys.SPACE)
    page.wait(lambda: page.offered(".mha"), "an .mha")
    page.tab_to("#form label:nth-of-type(3)")
    page.press(Keys.SPACE)
    page.wait(lambda: page.offered("_slice006.png"), "the picture of this slice")
    page.one("#slice input[type=range]").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.offered("_slice007.png"), "the picture of another slice")
    page.shoot("keyboard")


def test_an_example_with_its_reference_on_a_phone(visit):
    page = visit(390, 844)
    page.shoot("phone")
    width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]  # nothing to scroll sideways
    page.click("#examples button")
    page.wait(lambda: page.all("#targets input[type=checkbox]"), "targets")
    page.click("#start")
    page.wait(lambda: "Done" in page.text("#progress"), "the synthesis")
    page.wait(lambda: "Mean absolute difference" in page.text("#values"), "the difference from the reference")
    page.shoot("phone-result")
    width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


def test_dark_and_the_notice_that_stays(visit):
    page = visit(path="/?__theme=dark")
    ground = "return getComputedStyle(document.querySelector('.gradio-container')).backgroundColor"

    def is_dark():
        levels = page.driver.execute_script(ground).strip("rgba()").split(",")[:3]
        return all(int(level) < 60 for level in levels)

    page.wait(is_dark, "the dark theme")
    page.shoot("dark")
    assert "Research use only" in page.text("#notice") and "simulated" in page.text("#notice")
    page.driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert page.one("#notice footer").is_displayed()


def test_a_mistake_is_said_on_the_page(visit, tmp_path):
    page = visit()
    (tmp_path / "page.png").write_bytes(b"<html><script>alert(1)</script></html>")
    page.upload("#scan", tmp_path / "page.png")
    page.wait(lambda: "web page or a drawing" in page.driver.page_source, "the message")
    page.shoot("mistake")
    assert not page.driver.execute_script("return document.querySelectorAll('.toast-body script').length")


def test_the_quiz(visit):
    page = visit()
    page.click("button[role=tab]:nth-of-type(2)")
    page.click("#next-question")
    page.wait(lambda: len(page.all("#candidates img")) == 4, "four candidates")
    page.click("#choice input[type=radio]")
    page.wait(lambda: "It is" in page.text("#told"), "the truth")
    page.shoot("quiz")
