"""What features mean: statistics, evidence, tables.

What is counted of each feature, its density among it, is in `statistics.py`.
"""
