"""Numbers and nouns in messages."""


def count(number: float, noun: str) -> str:
    """As in "1 clip", "1,234 clips", "2 batches" and "3 classes"."""
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    plural = "es" if noun.endswith(("ch", "ss")) else "s"
    return f"{written} {noun}{'' if number == 1 else plural}"
