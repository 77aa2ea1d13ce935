"""The trained tier: the super-network, adapters, losses, one loop, and recovery of one network."""
