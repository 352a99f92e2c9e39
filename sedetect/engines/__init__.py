"""Serving engines whose own experts are measured. One module per engine; nothing here is imported unless asked for."""
