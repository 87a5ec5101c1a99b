"""Pages to keep and to show: HTML that stands by itself."""
