"""Where tokens come from: files, data sets, the model's own samples, instructions."""
