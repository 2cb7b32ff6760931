"""The command line, one module a command. Modules here import what is slow inside their functions."""
