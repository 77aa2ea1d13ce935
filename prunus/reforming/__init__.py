"""The weights that are kept take over the work of those that are not."""
