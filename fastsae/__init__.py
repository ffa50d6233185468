"""Parts that two or more of the scripts need. Nothing here imports config.py or a script."""
