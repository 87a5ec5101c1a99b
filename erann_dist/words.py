"""Numbers and nouns in messages."""


def count(number: float, noun: str) -> str:
    """As in "1 clip", "1,234 clips" and "2 batches"."""
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    plural = "es" if noun.endswith("ch") else "s"
    return f"{written} {noun}{'' if number == 1 else plural}"
