from __future__ import annotations

import pytest

from tests.report.browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A browser; tests that use it are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
