"""The TRL patch_point: the only part of the package that knows how TRL's trainers work inside."""

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from trl_refplug.trainers.plugged import plug
from trl_refplug.trainers.reference_model import ReferenceModel
from trl_refplug.trainers.trl_patch import PatchPoint


RefPlugDPOTrainer = plug(DPOTrainer)
RefPlugKTOTrainer = plug(KTOTrainer)
RefPlugGRPOTrainer = plug(GRPOTrainer)
RefPlugRLOOTrainer = plug(RLOOTrainer)

for _trainer in (RefPlugDPOTrainer, RefPlugKTOTrainer, RefPlugGRPOTrainer, RefPlugRLOOTrainer):
    _trainer.__module__ = __name__

__all__ = [
    "PatchPoint",
    "RefPlugDPOTrainer",
    "RefPlugGRPOTrainer",
    "RefPlugKTOTrainer",
    "RefPlugRLOOTrainer",
    "ReferenceModel",
    "plug",
]
