"""Data sets on disk, read as rows: key, labels, location of the audio. Nothing is decoded here."""
