"""Training runs that are followed while they happen. A module is imported only when it is asked for.

Training and engines do not know each other.
"""
