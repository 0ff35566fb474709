"""Schedules, AdamW and Muon."""
