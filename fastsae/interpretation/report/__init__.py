"""The report interpretations.html."""
