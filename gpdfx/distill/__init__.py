"""Distillation: GPD as a module, losses of logits and of features."""

from .features import FeatureLoss as FeatureLoss
from .features import FitNet as FitNet
from .features import ReviewKD as ReviewKD
from .gpd import GPD as GPD
from .gpd import Distilled as Distilled
from .losses import DKD as DKD
from .losses import KD as KD
from .losses import soft_cross_entropy as soft_cross_entropy
