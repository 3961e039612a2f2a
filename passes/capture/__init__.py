"""Capture: a module -> ATen graphs."""
