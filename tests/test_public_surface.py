"""What users write changes on purpose only."""

from public_surface import FILE, surface


def test_names_commands_and_keys_are_those_written_down() -> None:
    assert surface() == FILE.read_text(encoding="utf-8"), "python tests/public_surface.py"
