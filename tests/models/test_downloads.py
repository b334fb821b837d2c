"""Downloads give up at once, and only within."""

import logging

import pytest

from treeify.models.downloads import without_retries

LOG = logging.getLogger("huggingface_hub.utils._http")


def test_the_first_retry_ends_the_download_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ConnectionError, match="no route"), without_retries():
        LOG.warning("no route")
        LOG.warning("Retrying in 1s [Retry 1/5].")
    LOG.warning("Retrying in 1s [Retry 1/5].")
    assert [record.getMessage() for record in caplog.records] == ["Retrying in 1s [Retry 1/5]."]
