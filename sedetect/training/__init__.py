"""Training runs that are followed while they happen. Nothing here is imported unless asked for."""
