"""Before anything is imported: no test asks the hub, and none depends on the terminal it is run from.

And which tests run: those marked gpu where there are as many GPUs as they need, those marked torchvision where it is
installed, those that open a browser where one is.
"""

import importlib.util
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
# As the command line sets them before it imports the libraries, which tests import first.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import support.interpreter  # noqa: E402  before anything imports triton
import torch  # noqa: E402
from support.command import run  # noqa: E402
from support.models import TINY  # noqa: E402

import sedetect  # noqa: E402

if importlib.util.find_spec("torchvision"):
    import support.vision  # noqa: F401  before a processor imports it


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")


def pytest_runtest_setup(item):
    for marker in item.iter_markers("gpu"):
        needed = marker.kwargs.get("number", 1)
        if torch.cuda.device_count() < needed:
            pytest.skip("needs a GPU" if needed == 1 else f"needs {needed} GPUs")
    if item.get_closest_marker("torchvision") and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision: its processor has a part without another backend")


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory):
    """The folder of a profile of tiny-moe, to read: what a test writes goes elsewhere."""
    folder = tmp_path_factory.mktemp("tiny")
    assert run("profile", TINY, "-o", folder, "--tokens", 2048, "--seq-len", 128).code == 0
    return folder


@pytest.fixture(scope="session")
def tiny_report(tiny_profile, tmp_path_factory):
    """(folder, printed): tiny_profile with everything else that a report shows, and the report with its figures."""
    folder = tmp_path_factory.mktemp("full") / "tiny"
    shutil.copytree(tiny_profile, folder)
    short = ("-o", folder, "--seq-len", 64)
    assert run("analyze", "residual", TINY, *short, "--sequences", 2, "--ablate", "L1E28")[0] == 0
    assert run("analyze", "trace", TINY, *short, "--experts", "L1E28", "--tokens", 512)[0] == 0
    stats = ("--stats", folder, "--experts", "L1E28", "--how", "skip", "--controls", 1, "--sequences", 1)
    assert run("ablate", TINY, *short, *stats, "--tokens", 256)[0] == 0
    code, out, err = run("report", folder, "--figures")
    assert code == 0, err
    return folder, out


@pytest.fixture(scope="session")
def tiny_stats():
    """Statistics of twice as many tokens, to read."""
    return sedetect.profile_model(TINY, text=sedetect.Text(tokens=4096, seq_len=128)).stats


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. SEDETECT_NEED_BROWSER=1 makes its absence a failure."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        message = "no Chromium: install the package chromium to open the report in a browser"
        pytest.fail(message) if os.environ.get("SEDETECT_NEED_BROWSER") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
    ]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=quiet)
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Opens a page and records what happens on it: open(path, **context options) -> (page, events)."""
    contexts = []

    def open_page(path, **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page, events = contexts[-1].new_page(), []
        page.on("console", lambda message: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: events.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        page.wait_for_selector("html.drawn", state="attached")
        assert events.pop(0) == f"request: {path.as_uri()}"
        return page, events

    yield open_page
    for context in contexts:
        context.close()
