"""How long a network takes on this device: tables that are measured, and what they predict."""
