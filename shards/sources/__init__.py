"""Data sets as they lie on disk, read as rows: key, labels, where the audio is. Nothing is decoded here."""
