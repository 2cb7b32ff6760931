"""
Rows of tokens, the common language of scoring, the store, serving and the providers.

- `row`: one sequence of tokens without padding, and which of them are scored
- `padded`: the rows of a batch, and how to put rows and their values back into its padding
- `planned`: the rows that a run will ask for, where they are known before training
- `answers`: the form that the answer to a batch must have
"""

from trl_refplug.rows.answers import form_problem
from trl_refplug.rows.padded import PaddedRows, Values
from trl_refplug.rows.planned import PlannedRows, PlansRows
from trl_refplug.rows.row import IGNORED, Ints, Row, check_labels, unpad


__all__ = [
    "IGNORED",
    "Ints",
    "PaddedRows",
    "PlannedRows",
    "PlansRows",
    "Row",
    "Values",
    "check_labels",
    "form_problem",
    "unpad",
]
