"""Data sets that a package ships or generates, and folders of the user's."""

from .datasets import load_data as load_data
