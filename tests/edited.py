"""Files of JSON that are changed on purpose, so that their checksums are right all the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treeify.conversion import checksums


@contextmanager
def edited(file: Path) -> Iterator[dict[str, Any]]:
    """The values in a file, which are written back."""
    values = json.loads(file.read_text())
    yield values
    file.write_text(checksums.seal(values) if checksums.FILES in values else json.dumps(values))
