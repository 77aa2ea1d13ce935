"""What a model is: its family's table, its shapes and costs, slices of it, and how it is read and written."""
