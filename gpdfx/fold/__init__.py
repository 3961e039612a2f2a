"""Fold: branches, scales and shares -> the weights that teacher and student read."""

from .layer import Fold as Fold
from .many import Chunk as Chunk
from .many import chunks as chunks
from .many import operator_get as operator_get
from .names import PREFIX as PREFIX
from .names import Branched as Branched
from .names import Folded as Folded
from .names import Lowered as Lowered
from .names import Make as Make
from .names import kernel as kernel
from .names import merged as merged
from .names import module_of as module_of
from .names import plain as plain
from .names import students as students
from .names import teachers as teachers
from .whole import Folding as Folding
from .whole import Late as Late
