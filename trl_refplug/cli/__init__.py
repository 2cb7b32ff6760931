"""The command line, with one module for each command. What is slow to import is imported inside the functions."""
