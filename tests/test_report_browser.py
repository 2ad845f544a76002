"""The report in a real browser: light and dark, on a wide screen and a narrow one."""

import shutil
import subprocess

import pytest
from PIL import Image

from pipeline import load_job, run_job
from pipeline.tools.report.palette import DARK, LIGHT
from pipeline.tools.report.report import report_job
from tests.command import write_job

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "disable-sync")
OFFLINE = ("disable-background-networking", "disable-component-update")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def shown(page, picture, width, *, dark):
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = picture.with_suffix(".profile")
    switches = [f"--{switch}" for switch in (*QUIET, *OFFLINE)]
    command = [CHROMIUM, *switches, *scheme, f"--user-data-dir={profile}", f"--window-size={width},2400"]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        return image.convert("RGB")


def hexadecimal(pixel):
    return "#" + "".join(f"{channel:02x}" for channel in pixel)


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize(("dark", "palette"), [(False, LIGHT), (True, DARK)], ids=["light", "dark"])
def test_the_page_has_the_colours_of_its_scheme_and_drawings_in_them(tmp_path, width, dark, palette):
    prompts = [{"prompt": "word " * (1 + number % 20)} for number in range(80)]
    job = write_job(tmp_path, prompts, model={"engine": "echo", "echo": {"delay": "5ms", "fail_every": 9}})
    run_job(load_job(job), quiet=True)
    image = shown(report_job(load_job(job)), tmp_path / "page.png", width, dark=dark)
    colours = {hexadecimal(colour): count for count, colour in image.getcolors(1 << 24)}
    assert hexadecimal(image.getpixel((2, 2))) == palette.background
    assert max(colours, key=colours.get) == palette.background
    assert colours[palette.soft] > 1000 and colours[palette.panel] > 1000  # areas of the drawings, key figures
    other = LIGHT if dark else DARK
    assert other.background not in colours and other.soft not in colours
    # Nothing runs over the right edge: the margin is empty from top to bottom.
    margin = image.crop((width - 10, 0, width, image.height)).getcolors()
    assert [hexadecimal(colour) for _, colour in margin] == [palette.background]
