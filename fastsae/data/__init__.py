"""Rows of datasets, chat templates, tokens and which of them count."""
