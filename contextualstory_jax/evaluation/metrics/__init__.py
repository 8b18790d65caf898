"""Metrics: objects that are given stories batch by batch."""
