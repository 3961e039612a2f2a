"""Branches: other ways to write a weight, which train beside it and merge into it."""

from .kinds import Average as Average
from .kinds import Branch as Branch
from .kinds import Frequency as Frequency
from .kinds import Full as Full
from .kinds import Identity as Identity
from .kinds import Line as Line
from .kinds import LowRank as LowRank
from .kinds import Pointwise as Pointwise
from .kinds import Product as Product
from .kinds import Separable as Separable
from .layer import Layer as Layer
from .sets import SETS as SETS
from .sets import BranchSet as BranchSet
from .term import Term as Term
