"""
The `cached` provider: log-probs that another provider has scored, kept in a store.

- `provider`: the provider itself, which looks rows up and has the missing ones scored
- `row_keys`: cuts a batch into rows, and gives each row its key in the store
- `missing_rows`: finds the rows that training will ask for and that the store does not have
- `filler`: decides when missing rows are scored, before training or when training asks for them
- `filling`: scores all the missing rows of a run, many at a time
- `source_probe`: makes sure that what scores is the reference whose rows the store has
- `sample_check`: scores a few stored rows once more, to see whether the store has the right values
- `policy_source`: the policy as the model that scores, for as long as it has not been trained
- `batch_scorer`: scores many rows with a source that takes one batch at a time
- `sharing`: divides the work between several processes that fill the same store
"""
