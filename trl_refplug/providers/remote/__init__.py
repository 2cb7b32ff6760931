"""
The `remote` provider: a reference that a server has.

- `provider`: the provider itself, which sends rows to the server and returns its answers
- `checks`: connects to the server, and checks that it has the reference that the run declares
"""
