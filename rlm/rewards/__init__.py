"""Parsing of responses and the rewards computed from them."""
