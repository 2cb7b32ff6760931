"""
Rows of tokens: what scoring, the store, serving and the providers all speak.

- `row`: one sequence of tokens without padding, and which of them are scored
- `padded`: the rows of a batch, and how to put them back into its padding
- `answers`: what the answer to a batch has to look like
"""

from trl_refplug.rows.answers import form_problem
from trl_refplug.rows.padded import PaddedRows, Values
from trl_refplug.rows.row import IGNORED, Ints, Row, check_labels, rows_of


__all__ = ["IGNORED", "Ints", "PaddedRows", "Row", "Values", "check_labels", "form_problem", "rows_of"]
