"""Files of JSON that are changed on purpose, so that their digests are right all the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treeify import digests


@contextmanager
def edited(file: Path) -> Iterator[dict[str, Any]]:
    """The values in a file, which are written back."""
    values = json.loads(file.read_text())
    yield values
    file.write_text(digests.seal(values) if digests.FILES in values else json.dumps(values))
