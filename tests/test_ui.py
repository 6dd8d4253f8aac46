"""MLflow's pages, as a person sees them in a browser: the runs, a metric's curve, the registered models."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from portllm.tracking import Dataset, VersionRequest, store, track

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MODEL = "portllm-world_boolq"
STEPS = 20
PATIENCE_MS = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; set CHROMIUM to one"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of an MLflow server over a project whose pipeline has run once."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as env:
        for key in list(os.environ):
            if key.startswith(("MLFLOW_", "DVC_", "PORTLLM_")):
                env.delenv(key)
        env.setenv("PORTLLM_INVOCATION", "repro 11-22 08:40")
        env.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        # the server's own job runners are for chats, and start slowly
        env.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        _run_pipeline(root)
        with _server(store.tracking_uri(root), root) as address:
            yield address


@pytest.fixture(scope="module")
def page(url, tmp_path_factory):
    """A browser with an empty profile that reaches nothing but the server."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as drive:
        browser = drive.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1500, "height": 950},
        )  # fmt: skip
        browser.set_default_timeout(PATIENCE_MS)
        browser.route("**/*", lambda route: route.continue_() if route.request.url.startswith(url) else route.abort())
        yield browser.pages[0]
        browser.close()


def test_the_runs_stand_under_their_invocation_and_a_metric_is_a_curve(page, url, tmp_path):
    page.goto(f"{url}/#/experiments/1/runs?workflowType=machine_learning")
    parent = page.get_by_role("gridcell").filter(has_text="repro 11-22 08:40")
    parent.wait_for()
    # folded: one line per invocation
    assert page.get_by_text("train v0/world_boolq").count() == 0
    parent.get_by_role("button").first.click()
    page.get_by_role("link", name="train v0/world_boolq").wait_for()
    assert page.get_by_role("link", name="register v1").is_visible()
    assert page.get_by_text("world_boolq (").first.is_visible()
    page.screenshot(path=tmp_path / "runs.png")

    page.get_by_role("link", name="train v0/world_boolq").click()
    page.get_by_role("tab", name="Model metrics").click()
    page.locator(".js-plotly-plot .scatterlayer path.js-line").first.wait_for(state="attached")
    assert page.get_by_text("loss", exact=True).first.is_visible()
    points = [trace.locator("path.point").count() for trace in page.locator(".scatterlayer .trace").all()]
    assert STEPS in points
    page.screenshot(path=tmp_path / "curve.png")


def test_the_registered_models_are_listed(page, url, tmp_path):
    page.goto(f"{url}/#/models?workflowType=machine_learning")
    link = page.get_by_role("link", name=MODEL)
    link.wait_for()
    greeting = page.get_by_role("button", name="Try it now")
    page.wait_for_timeout(1_000)
    if greeting.is_visible():
        greeting.click()
    assert page.get_by_text("champion").first.is_visible()
    page.screenshot(path=tmp_path / "models.png")
    page.goto(f"{url}/#/models/{MODEL}/versions/1")
    page.get_by_text("ported 0.9000 is above base 0.5000").wait_for()
    assert page.get_by_role("link", name="register v1").is_visible()
    page.screenshot(path=tmp_path / "version.png")


def _run_pipeline(root: Path) -> None:
    checkpoint = root / "models/ported/v1/world_boolq"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}\n")
    candidate = VersionRequest(
        name=MODEL, checkpoint=checkpoint, release="v1", task="world_boolq", ported="e1" * 32, alias="champion",
        metrics={"acc,none": 0.9, "base acc,none": 0.5}, description="ported 0.9000 is above base 0.5000",
    )  # fmt: skip
    with (
        track("train", name="train v0/world_boolq", params={"lora": {"r": 8}}, root=root) as train,
        track("register", name="register v1", params={}, root=root) as register,
    ):
        for step in range(STEPS):
            train.metrics(step, {"loss": 1.0 / (step + 1)})
        train.finish(datasets=[Dataset("world_boolq", "da" * 32, "data/world_boolq")])
        register.register([candidate])


@contextlib.contextmanager
def _server(backend: str, folder: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", backend, "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--workers", "1"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(port, server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        # its workers are in its session
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit and server.poll() is None:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as ask:
            ask.request("GET", "/health")
            if ask.getresponse().status == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"MLflow's server does not answer: {log.read_text()[-2000:]}")
