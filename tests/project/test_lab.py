"""`make lab`: what JupyterLab serves and where it writes, and the playground in a browser where one is installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_project import ENVIRONMENT, ROOT

TOKEN = "of-this-test"
PLAYGROUND = "notebooks/playground.ipynb"


class Lab(NamedTuple):
    folder: Path
    home: Path
    address: str

    def ask(self, path: str, method: str = "GET") -> HTTPResponse:
        headers = {"Authorization": f"token {TOKEN}"}
        return urllib.request.urlopen(
            urllib.request.Request(f"{self.address}{path}", method=method, headers=headers), timeout=30
        )

    def files(self) -> dict[Path, bytes]:
        """What is in the project and in the home folder, but for build/."""
        build = self.folder / "build"
        paths = [*self.folder.rglob("*"), *self.home.rglob("*")]
        return {path: path.read_bytes() for path in paths if path.is_file() and build not in path.parents}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as a container starts it, on a copy of the playground."""
    folder, home, port = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("home"), free_port()
    for name in ("tools", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "[0-9]*", ".ipynb*"))
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    installed = (f"PYTHON={sys.executable}", f"RUN={sys.executable}", "READY=requirements.txt")
    subprocess.run(["make", *installed, "help"], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    own = {"HOME": str(home), "JUPYTER_PORT": str(port), "JUPYTER_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    own |= {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(folder / "build"), "PYTHONUNBUFFERED": "1"}
    with open(folder / "build/log", "w") as log:
        server = subprocess.Popen(
            ["make", *installed, "lab", "CONTAINER=1"],
            cwd=folder, env=ENVIRONMENT | own, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        found = Lab(folder, home, f"http://127.0.0.1:{port}")
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    found.ask("/api/status")
                    break
                except OSError:
                    assert server.poll() is None, (folder / "build/log").read_text()
                    assert time.monotonic() < until, (folder / "build/log").read_text()
                    time.sleep(0.2)
            yield found
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def test_the_repository_is_served_with_its_notebooks_open(lab: Lab) -> None:
    served = {entry["name"] for entry in json.load(lab.ask("/api/contents/"))["content"]}
    assert {"Makefile", "notebooks", "tools"} <= served
    assert lab.ask("/").url.endswith("/lab/tree/notebooks")
    assert "--allow-root" in (lab.folder / "build/log").read_text()


def test_what_it_writes_is_in_build(lab: Lab) -> None:
    before = lab.files()
    assert lab.ask(f"/api/contents/{PLAYGROUND}/checkpoints", "POST").status == 201
    assert list((lab.folder / "build/jupyter/checkpoints").rglob("playground-checkpoint.ipynb"))
    assert lab.files() == before
    assert not [path for path in lab.home.rglob("*") if path.is_file()]


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and chromedriver")
def test_the_playground_answers_in_a_browser(lab: Lab) -> None:
    from selenium import webdriver
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.expected_conditions import element_to_be_clickable
    from selenium.webdriver.support.ui import Select, WebDriverWait

    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1400"):
        options.add_argument(f"--{option}")
    options.binary_location = shutil.which("chromium") or ""
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    wait = WebDriverWait(browser, 120)

    def click(path: str, seconds: float = 120) -> None:
        WebDriverWait(browser, seconds).until(element_to_be_clickable((By.XPATH, path))).click()

    def run_all() -> None:
        """The menu closes where it opens while the notebook is still being loaded: then once more."""
        for _ in range(10):
            click("//div[@class='lm-MenuBar-itemLabel'][.='Run']")
            with contextlib.suppress(TimeoutException):
                return click("//div[@class='lm-Menu-itemLabel'][.='Run All Cells']", 10)
            browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        pytest.fail("the menu does not open")

    def page() -> str:
        found = browser.find_elements(By.CSS_SELECTOR, ".widget-vbox .widget-html-content")
        return found[-1].get_attribute("innerHTML") if found else ""

    def changed(before: str) -> str:
        wait.until(lambda _: page() not in ("", before))
        return page()

    try:
        browser.get(f"{lab.address}/lab/tree/{PLAYGROUND}?token={TOKEN}")
        idle = "//*[@id='jp-main-statusbar']//*[contains(., '| Idle')]"  # before that cells may be dropped
        wait.until(lambda _: browser.find_elements(By.XPATH, idle))
        run_all()
        repaired = changed("")
        assert "lantern" in repaired
        *_, repair = browser.find_elements(By.CSS_SELECTOR, ".widget-dropdown select")
        Select(repair).select_by_visible_text("leave")
        left = changed(repaired)
        assert left.count("lantern") < repaired.count("lantern"), "what is left damaged has lost the answer"
        severity, *_ = browser.find_elements(By.CSS_SELECTOR, ".widget-hslider .noUi-handle")
        severity.send_keys(Keys.HOME)
        intact = changed(left)
        assert "underline" in left
        assert "underline" not in intact, "at severity 0 no token has changed"
    finally:
        browser.quit()
