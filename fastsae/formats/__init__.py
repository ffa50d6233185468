"""Autoencoders of other libraries read and written, and the model card.

A new format to read is a file in `readers/`. Formats of datasets are in `fastsae/data/`.
"""
