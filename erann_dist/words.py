"""Numbers and nouns in messages."""


def count(number: float, noun: str) -> str:
    """As in "1 clip" and "1,234 clips"."""
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{written} {noun}{'' if number == 1 else 's'}"
