"""Seeds for one purpose each, far from every other's."""

import hashlib


def seed_of(*purpose: object) -> int:
    """A 64-bit seed that depends on the purpose's words and nothing else."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
