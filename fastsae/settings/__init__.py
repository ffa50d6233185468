"""Settings: constants at the top of files, flags, presets and rules. Standard library only.

Outside only `config.py` uses this package; the rest of fastsae takes plain values.
"""
