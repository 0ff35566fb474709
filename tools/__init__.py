"""Commands run by hand: python -m tools.NAME."""
