"""Measurements: coverage of public networks, exactness, speed and memory."""
