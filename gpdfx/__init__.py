"""gpdfx: Gap Preserving Distillation (arXiv 2410.04140) for any PyTorch network.

teacher = gpdfx.expand(student, ratio=2)   # wider, the same function
teacher(x), teacher.student(x)             # trained together, on shared parameters
plain = gpdfx.collapse(teacher)            # the user's own class again
"""

from .allocator import keep_memory as keep_memory
from .checkpoint import to_student as to_student
from .checkpoint import to_teacher as to_teacher
from .errors import AxisConflict as AxisConflict
from .errors import CaptureError as CaptureError
from .errors import GpdfxError as GpdfxError
from .errors import InputError as InputError
from .errors import LossyError as LossyError
from .expand import expand as expand
from .explain import explain as explain
from .explain import graph as graph
from .gpd import GPD as GPD
from .gpd import Distilled as Distilled
from .groups import param_groups as param_groups
from .report import Report as Report
from .rule import rule as rule
from .rule import unrule as unrule
from .storage import load as load
from .storage import save as save
from .teacher import Teacher as Teacher
from .teacher import collapse as collapse

__version__ = "0.1.0"
