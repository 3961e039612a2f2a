"""Data sets that a package ships or generates, and folders of the user's."""

from .sources import load_data as load_data
