"""Rows of datasets, chat templates, tokens and which of them count.

`datasets.py` reads rows; a new format of rows is a branch of `_example` there.
"""
