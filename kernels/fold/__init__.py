"""The branch fold: branches, scales and shares of many layers -> their weights, and back."""

from . import reference as reference
from .function import fold as fold
from .reference import autocast_type as autocast_type
from .site import Cut as Cut
from .site import Share as Share
from .site import Site as Site
from .site import cut_of as cut_of
from .site import key_of as key_of
from .site import owned as owned
from .site import refusal as refusal
