"""Speed, quality and robustness of the pipeline, beside other libraries where there are any."""
