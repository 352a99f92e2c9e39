"""The files of a checkpoint: headers, bytes, memory, and how the bytes get to a device.

No model and no modeling code: modules here must not import transformers' models.
"""
