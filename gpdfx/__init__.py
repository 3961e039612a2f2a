"""gpdfx: Gap Preserving Distillation (arXiv 2410.04140) for any PyTorch network.

teacher = gpdfx.expand(student, ratio=2)   # wider, the same function
teacher(x), teacher.student(x)             # trained together, on shared parameters
plain = gpdfx.collapse(teacher)            # the user's own class again
"""

from . import _links as _links
from .access.collapse import collapse as collapse
from .access.groups import param_groups as param_groups
from .access.plain.deploy import plain_teacher as plain_teacher
from .access.states import to_student as to_student
from .access.states import to_teacher as to_teacher
from .compiler import expand as expand
from .custom_ops import rule as rule
from .custom_ops import unrule as unrule
from .distill import features as features
from .distill import losses as losses
from .distill.gpd import GPD as GPD
from .distill.gpd import Distilled as Distilled
from .errors import AxisConflict as AxisConflict
from .errors import CaptureError as CaptureError
from .errors import GpdfxError as GpdfxError
from .errors import InputError as InputError
from .errors import LossyError as LossyError
from .memory import keep_memory as keep_memory
from .report.explain import explain as explain
from .report.picture import graph as graph
from .report.report import Report as Report
from .storage import load as load
from .storage import save as save
from .teacher.module import Teacher as Teacher

__version__ = "0.1.0"
