"""
What the `cached` provider is made of.

- `row_keys`: the rows of a batch and their keys in the store
- `borrowed`, `named_model`: who scores what is missing
- `survey`: what a store misses of the rows that training will ask for
- `filling`: scoring what is missing, ahead of training or as it is asked for
- `verifying`: a sample of what is stored, scored once more
- `batch_scorer`, `sharing`: whole batches on all ranks in step; work shared with other processes
"""
