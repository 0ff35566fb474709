"""Procedural problems with levels, worked solutions and verifiers."""
