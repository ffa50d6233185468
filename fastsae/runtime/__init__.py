"""What every stage stands on: errors, files, output, processes; no model and no autoencoder.

Every file is written by `storage.py`; `artifacts.py` adds the metadata that stages check.
"""
