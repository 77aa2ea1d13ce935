"""What may be searched, what it costs, and which network is best under a budget."""
