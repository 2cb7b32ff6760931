"""
The trainers: TRL's, patched so that they ask a provider for their reference. No other part of the package knows how
TRL's trainers work inside, and this part knows no provider by name.

- `plugged_trainer`: makes a subclass of a trainer that takes its reference from a provider
- `trl_patch`: replaces the function with which TRL loads a reference
- `selection`: finds out which provider the flags mean, and makes it
- `open_session`: checks the trainer's arguments, and opens the session of its reference
- `session`: takes one trainer's reference through its whole life
- `context`: what a provider gets to see of the run
- `placement`: does to a model what TRL does to its own reference
- `policy`: what has to be known of the policy: its adapters, and how its log-probs come out
- `reference_model`: the module in `trainer.ref_model`, which passes every batch to the provider
- `prefetch`: asks the provider about the next batches ahead of time
- `requested_batches`: predicts what the trainer will ask about a batch
- `planned_rows`: the same for all rows of a data set, without collating them
- `reference_columns`: adds the reference's log-probs to a data set, as columns
- `reference_check`: the flag `ref_check`, which checks that the reference is, and stays, the one that was declared
- `rank_check`: compares the reference between ranks
- `read_only`: shows the reference's weights so that nobody can change them
- `callback`: tells the session when training begins, makes a step and ends
- `checkpoint`: writes the reference into checkpoints, and compares a resumed run with them
"""

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from trl_refplug.trainers.plugged_trainer import plug
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
