"""Rows of datasets, chat templates, tokens and which of them count.

`readers/` has a file for each kind of source, in a table; `rows.py` says what a row means.
"""
