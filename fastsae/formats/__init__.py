"""Autoencoders of other libraries read and written, and the model card."""
