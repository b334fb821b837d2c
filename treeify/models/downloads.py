"""Downloads of trained weights that give up in seconds where there is no network."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Where the hub announces in its log what went wrong, and then that it will try again.
_LOG, _RETRY = logging.getLogger("huggingface_hub.utils._http"), "Retrying in "


@contextmanager
def without_retries() -> Iterator[None]:
    """Let the hub's downloads fail at once: it would try twelve times, for minutes.

    Raises:
        ConnectionError: within, in place of a second attempt.
    """
    # The number of attempts is no setting of the hub's; its log tells before it waits.
    stop = _StopRetries()
    _LOG.addFilter(stop)
    try:
        yield
    finally:
        _LOG.removeFilter(stop)


class _StopRetries(logging.Filter):
    """Notes why a request failed, and raises before it is tried again."""

    reason = "no connection"

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith(_RETRY):
            raise ConnectionError(self.reason)
        self.reason = message
        return False
