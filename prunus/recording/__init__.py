"""The run directory and what a person reads: artefacts, reports, pictures, tables."""
